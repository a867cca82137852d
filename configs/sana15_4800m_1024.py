"""SANA-1.5 4.8B at 1024 pixels: 60 blocks, CAME with a moment of 8 bits.

Upstream grows it from the first 18 blocks of 1.6B; here it is fine-tuned by
`--config.init_from=SANA1.5_4.8B_1024px`, or begun with random numbers. See
`sana15_1600m_1024` for what is published and what is ours.
"""

from configs import sana15_1600m_1024
from sana_jax import config as config_lib
from sana_jax import presets


def get_config(hardware: str | None = None) -> config_lib.TextToImageConfig:
  """Returns the run; effective learning rate 2.8e-5."""
  config = sana15_1600m_1024.get_config()
  config.model = config_lib.sana15_4800m()
  config.components = "SANA1.5_4.8B_1024px"
  config.optim.name = "came_8bit"
  return presets.apply(config, hardware)
