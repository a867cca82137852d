"""The learning rate of every update."""

import math

import optax

from sana_jax import config as config_lib

# What SANA's published learning rates are meant with.
_BASE_BATCH = 256


def make_schedule(
  config: config_lib.OptimConfig, *, num_steps: int, batch_size: int
) -> optax.Schedule:
  """Rises linearly to the peak, then stays, or falls as the config says.

  Raises:
    ValueError: fewer steps than warm-up and decay take.
  """
  peak = _peak(config, batch_size)
  warmup = optax.linear_schedule(0.0, peak, max(config.warmup_steps, 1))
  if config.schedule == "constant":
    return optax.join_schedules(
      [warmup, optax.constant_schedule(peak)], [config.warmup_steps]
    )
  if config.schedule == "cosine":
    steps = max(num_steps - config.warmup_steps, 1)
    after = optax.cosine_decay_schedule(
      peak, steps, alpha=config.final_lr_ratio
    )
    return optax.join_schedules([warmup, after], [config.warmup_steps])
  start = num_steps - config.decay_steps
  if start < config.warmup_steps:
    raise ValueError(
      f"optim.warmup_steps ({config.warmup_steps}) and optim.decay_steps "
      f"({config.decay_steps}) are more than num_steps ({num_steps})."
    )
  fall = optax.linear_schedule(
    peak, config.final_lr_ratio * peak, config.decay_steps
  )
  return optax.join_schedules(
    [warmup, optax.constant_schedule(peak), fall], [config.warmup_steps, start]
  )


def _peak(config: config_lib.OptimConfig, batch_size: int) -> float:
  ratio = batch_size / _BASE_BATCH
  factors = {"none": 1.0, "sqrt": math.sqrt(ratio), "linear": ratio}
  return config.peak_lr * factors[config.batch_scaling]
