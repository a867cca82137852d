"""SANA-1.5 1.6B at 1024 pixels: query and key norms, a fifth of the rate.

`--config.init_from=SANA1.5_1.6B_1024px` fine-tunes the published one. See
`sana_1600m_1024` for what is published and what is ours. A batch of 2 per GPU
is published; 512 in all is ours. Upstream also leaves out pictures whose prompt
has a CLIP score below 22: `--min_clip_score=22` of sana_jax.precompute, or
`--config.data.min_clip_score=22` with pictures.
"""

from configs import sana_1600m_1024
from sana_jax import config as config_lib
from sana_jax import presets


def get_config(hardware: str | None = None) -> config_lib.TextToImageConfig:
  """Returns the run; effective learning rate 2e-5 * sqrt(2) = 2.8e-5."""
  config = sana_1600m_1024.get_config()
  config.model = config_lib.sana15_1600m()
  config.components = "SANA1.5_1.6B_1024px"
  config.optim.peak_lr = 2e-5
  config.batch_size = 512
  return presets.apply(config, hardware)
