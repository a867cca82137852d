"""Guidance: combinators that turn velocity functions into better ones."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Real

from sana_jax.typing import ConditionalVelocityFn, VelocityFn


def condition_on(
  velocity_fn: ConditionalVelocityFn, condition: PyTree
) -> VelocityFn:
  """Fixes the condition: no guidance, one pass a step."""
  return lambda x, sigma, timestep: velocity_fn(x, sigma, timestep, condition)


def classifier_free(
  velocity_fn: ConditionalVelocityFn,
  condition: PyTree,
  null_condition: PyTree,
  *,
  scale: Real[ArrayLike, ""],
  interval: tuple[float, float] | None = None,
) -> VelocityFn:
  """Extrapolates from the unconditional to the conditional velocity.

  v = v_null + scale (v_cond - v_null), both from one call on a batch of twice
  the size, [null, cond]. One pass with `condition` where guidance is off.

  Args:
    velocity_fn: network; its last argument is the condition.
    condition: pytree of arrays with leading axis b, such as (text, mask).
    null_condition: the same structure and shapes, for the empty prompt.
    scale: guidance is off at 1 and below. Where this is traced, or an
      `interval` is given, a `lax.cond` saves the second pass.
    interval: guide only where low < sigma < high. None is everywhere; mind that
      (0, 1) leaves out sigma = 1, with which flow-Euler begins.

  Raises:
    ValueError: `interval` is empty.

  Source: Ho and Salimans, arXiv:2207.12598; the interval is
    Kynkaanniemi et al., arXiv:2404.07724.
  """
  if interval is not None and not interval[0] < interval[1]:
    raise ValueError(
      f"interval {interval} is empty: expected (low, high) with low < high, "
      "or None to guide at every step."
    )
  unguided = condition_on(velocity_fn, condition)
  if isinstance(scale, int | float) and scale <= 1:
    return unguided
  both = jax.tree.map(
    lambda null, cond: jnp.concatenate([null, cond]), null_condition, condition
  )

  def guided(x, sigma, timestep):
    twice = (jnp.concatenate([a, a]) for a in (x, sigma, timestep))
    null, cond = jnp.split(_full_precision(velocity_fn(*twice, both)), 2)
    return null + jnp.asarray(scale, cond.dtype) * (cond - null)

  if interval is None and isinstance(scale, int | float):
    return guided

  def guided_where_active(x, sigma, timestep):
    active = jnp.asarray(scale) > 1
    if interval is not None:
      # All samples of a sampler's step have the same sigma.
      active &= (interval[0] < sigma[0]) & (sigma[0] < interval[1])
    return jax.lax.cond(
      active,
      guided,
      lambda *args: _full_precision(unguided(*args)),
      *(x, sigma, timestep),
    )

  return guided_where_active


def _full_precision(velocity: Float[Array, "b *shape"]):
  # The guidance scale multiplies the rounding error of a difference.
  return velocity.astype(jnp.promote_types(velocity.dtype, jnp.float32))
