"""SANA 0.6B at 1024 pixels; --config.init_from=runs/512 goes on from 512.

See `sana_1600m_1024` for what is published and what is ours. The flow shift of
this one is 4, though the diffusers repository samples it with 3; bfloat16 in
place of float16 is ours.
"""

from configs import sana_1600m_1024
from sana_jax import config as config_lib
from sana_jax import presets


def get_config(hardware: str | None = None) -> config_lib.TextToImageConfig:
  """Returns the run; effective learning rate 2.8e-4."""
  config = sana_1600m_1024.get_config()
  config.model = config_lib.sana_600m()
  config.flow.shift = 4.0
  return presets.apply(config, hardware)
