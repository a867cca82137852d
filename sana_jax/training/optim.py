"""The optimiser: AdamW with warm-up, a schedule and clipping, from Optax."""

import optax

from sana_jax import config as config_lib


def make_schedule(
  config: config_lib.OptimConfig, num_steps: int
) -> optax.Schedule:
  """Rises linearly to the peak, then stays or falls along a cosine."""
  warmup = optax.linear_schedule(
    0.0, config.peak_lr, max(config.warmup_steps, 1)
  )
  if config.schedule == "constant":
    after = optax.constant_schedule(config.peak_lr)
  else:
    after = optax.cosine_decay_schedule(
      config.peak_lr,
      max(num_steps - config.warmup_steps, 1),
      alpha=config.final_lr_ratio,
    )
  return optax.join_schedules([warmup, after], [config.warmup_steps])


def make_optimizer(
  config: config_lib.OptimConfig, num_steps: int
) -> optax.GradientTransformation:
  """AdamW on every parameter, after clipping the global gradient norm.

  Weight decay applies to all tensors, norms and biases included, as in the
  published recipes (they define no exceptions).
  """
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      make_schedule(config, num_steps),
      b1=config.b1,
      b2=config.b2,
      eps=config.eps,
      weight_decay=config.weight_decay,
    ),
  )
