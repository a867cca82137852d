"""SANA 1.6B at 4096 pixels: positions at half the scale, flow shift 6.

Meant to begin with the model of 2048 or 1024 pixels: `--config.init_from=` its
work directory, or Sana_1600M_2Kpx_BF16. See `sana_1600m_1024` for what is
published and what is ours. A batch of 4 per GPU is published; 256 in all is
ours.
"""

from configs import sana_1600m_2k
from sana_jax import config as config_lib
from sana_jax import presets


def get_config(hardware: str | None = None) -> config_lib.TextToImageConfig:
  """Returns the run; effective learning rate 1e-4."""
  config = sana_1600m_2k.get_config()
  config.model = config_lib.sana_1600m_4k()
  config.data.image_size = 4096
  config.flow.shift = 6.0
  config.num_steps = 10_000
  return presets.apply(config, hardware)
