"""From a config to an Optax transformation."""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from sana_jax import config as config_lib
from sana_jax import sharding, tree
from sana_jax.training.optim import came, names, stacked
from sana_jax.training.optim import schedule as schedule_lib

# Makes the root mean square of Muon's updates that of AdamW's, so that learning
# rate and weight decay carry over (Liu et al., arXiv:2502.16982, section 2.2).
_MUON_RMS = 0.2


def make_optimizer(
  config: config_lib.OptimConfig,
  *,
  num_steps: int,
  batch_size: int,
  param_axes: Mapping[str, sharding.ParamAxes],
) -> optax.GradientTransformation:
  """Clips the global norm, then updates as `config.name` says.

  Weight decay applies to all tensors that the config does not exclude, norms
  and biases included, as in the published recipes (they define no exceptions).
  Statistics of means, norms and matrices are of a layer, not of a stack.

  Args:
    param_axes: {component name: sharding rows of that module}; they tell stacks
      and matrices.
  """
  axes_of = names.axes_by_name(param_axes)
  multipliers = config.lr_multipliers
  inner = optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.chain(
      _core(config, axes_of),
      optax.add_decayed_weights(config.weight_decay, _decay_mask(config)),
      optax.scale_by_learning_rate(
        schedule_lib.make_schedule(
          config, num_steps=num_steps, batch_size=batch_size
        )
      ),
      *([names.scale_by_name(multipliers)] if multipliers else []),
    ),
  )
  return names.by_name(
    inner,
    frozen=config.frozen,
    patterns={
      "optim.frozen": config.frozen,
      "optim.lr_multipliers": config.lr_multipliers,
      "optim.weight_decay_exclude": config.weight_decay_exclude,
    },
  )


def _core(
  config: config_lib.OptimConfig, axes_of: names.AxesFn
) -> optax.GradientTransformation:
  """What turns clipped gradients into updates of about unit size."""
  mu_dtype = jnp.dtype(config.moment_dtype)
  adam = optax.scale_by_adam(
    config.b1, config.b2, config.eps, mu_dtype=mu_dtype
  )
  if config.name == "adamw":
    return adam
  if config.name == "lion":
    return optax.scale_by_lion(config.b1, config.lion_b2, mu_dtype=mu_dtype)
  if config.name == "muon":
    return _muon(config, axes_of, adam)

  def is_stacked(name: str) -> bool:
    return axes_of(name)[:1] == ("layers",)

  if config.name == "adafactor":
    return stacked.per_layer(
      optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0)),
      is_stacked,
    )

  def block_axis(name: str) -> int:
    # Across "embed", which fully sharded parallelism cuts, a block would be of
    # several devices.
    return -2 if axes_of(name)[-1] == "embed" else -1

  return stacked.per_layer(
    came.scale_by_came(
      b1=config.b1,
      b2=config.b2,
      b3=config.came_b3,
      block_axis=block_axis if config.name == "came_8bit" else None,
    ),
    is_stacked,
  )


def _muon(
  config: config_lib.OptimConfig,
  axes_of: names.AxesFn,
  adam: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Orthogonalises the matrices inside blocks; Adam does the rest.

  A matrix has two named axes beside that of layers. So embeddings (of a
  vocabulary), tables of modulation, what goes from or to data, and convolutions
  of more than one pixel are left to Adam.
  """

  def label(name: str) -> str:
    axes = [axis for axis in axes_of(name) if axis != "layers"]
    inside = len(axes) == 2 and None not in axes and "vocab" not in axes
    return "muon" if inside else "adam"

  # All axes but the last two (of layers) are independent for Optax.
  last_two = contrib.MuonDimensionNumbers(-2, -1)
  orthogonalize = contrib.scale_by_muon(
    beta=config.muon_beta,
    mu_dtype=jnp.dtype(config.moment_dtype),
    weight_dimension_numbers=lambda updates: jax.tree.map(
      lambda _: last_two, updates
    ),
  )
  rescale = optax.stateless(
    lambda updates, params: jax.tree.map(
      lambda u: _MUON_RMS * math.sqrt(max(u.shape[-2:])) * u, updates
    )
  )
  return optax.partition(
    {"muon": optax.chain(orthogonalize, rescale), "adam": adam},
    lambda params: {name: label(name) for name in params},
  )


def _decay_mask(config: config_lib.OptimConfig):
  """None when all decay, so that no state keeps account of a mask."""
  if not config.weight_decay_exclude:
    return None
  return lambda params: {
    name: not tree.matches(name, config.weight_decay_exclude) for name in params
  }
