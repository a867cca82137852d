"""SANA 0.6B at 512 pixels, from random numbers.

See `sana_1600m_1024` for what is published and what is ours. A batch of 128 per
GPU is published; 2048 in all is ours, as is bfloat16 in place of float16.
"""

from configs import sana_1600m_512
from sana_jax import config as config_lib
from sana_jax import presets


def get_config(hardware: str | None = None) -> config_lib.TextToImageConfig:
  """Returns the run; effective learning rate 2.8e-4."""
  config = sana_1600m_512.get_config()
  config.model = config_lib.sana_600m()
  config.model.sample_size = 16
  return presets.apply(config, hardware)
