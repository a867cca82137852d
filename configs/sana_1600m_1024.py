"""SANA 1.6B at 1024 pixels, with the published hyper-parameters.

  python train.py --config=configs/sana_1600m_1024.py:v5e-256 \
    --workdir=runs/1024 --config.data.cache=CACHE --config.init_from=runs/512

What follows the colon is optional, see `sana_jax.presets`. CACHE is made by
`sana_jax.precompute --checkpoint=Sana_1600M_1024px_BF16 --buckets=aspect`.

Published are the architecture, the optimiser (CAME; its rate times
sqrt(batch / 256)), warm-up, clipping, flow shift, caption dropout and the
choice of captions. Ours are the batch of all devices (64 per GPU is published,
the number of GPUs is not), the number of steps, the average of the parameters
(upstream has none), and the prompts of the samples.
"""

from sana_jax import config as config_lib
from sana_jax import presets


def get_config(hardware: str | None = None) -> config_lib.TextToImageConfig:
  """Returns the run; effective learning rate 1e-4 * sqrt(2048 / 256) = 2.8e-4.

  Args:
    hardware: such as "v5e-256"; None: one device, or what the mesh says.
  """
  config = config_lib.TextToImageConfig()
  config.model = config_lib.sana_1600m()
  config.components = "Sana_1600M_1024px_BF16"
  config.use_complex_human_instruction = True
  config.flow.shift = 3.0
  config.flow.caption_dropout = 0.1
  config.data.image_size = 1024
  config.data.buckets = "aspect"
  config.data.max_buckets = 40
  config.data.caption_method = "clip_power"
  config.data.caption_temperature = 0.1
  config.data.caption_threshold = 25.0
  config.optim.name = "came"
  config.optim.peak_lr = 1e-4
  config.optim.batch_scaling = "sqrt"
  config.optim.warmup_steps = 2000
  config.optim.weight_decay = 0.0
  config.optim.clip_norm = 0.1
  config.seed = 1
  config.batch_size = 2048
  config.num_steps = 100_000
  config.dtype = "bfloat16"
  config.remat = "full"
  config.sample_prompts = (
    "a lighthouse on a cliff at dusk, waves below",
    "portrait of an old fisherman, soft window light",
    "an oil painting of a robot gardener among sunflowers",
    "a red bicycle leaning on a blue wall",
    "a small fox asleep in fresh snow",
  )
  return presets.apply(config, hardware)
