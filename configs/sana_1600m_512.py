"""SANA 1.6B at 512 pixels: where the family begins, from random numbers.

See `sana_1600m_1024` for what is published and what is ours. A batch of 64 per
GPU is published; 2048 in all, and 200,000 steps, are ours.
"""

from configs import sana_1600m_1024
from sana_jax import config as config_lib
from sana_jax import presets


def get_config(hardware: str | None = None) -> config_lib.TextToImageConfig:
  """Returns the run; effective learning rate 2.8e-4."""
  config = sana_1600m_1024.get_config()
  config.model.sample_size = 16
  config.data.image_size = 512
  config.num_steps = 200_000
  return presets.apply(config, hardware)
