"""Guidance: combinators that turn velocity functions into better ones."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Real

from sana_jax.diffusion import flow
from sana_jax.typing import ConditionalVelocityFn, VelocityFn


def classifier_free(
  velocity_fn: ConditionalVelocityFn,
  condition: PyTree,
  null_condition: PyTree,
  *,
  scale: Real[ArrayLike, ""],
) -> VelocityFn:
  """Extrapolates from the unconditional to the conditional velocity.

  v = v_null + scale (v_cond - v_null), both from one call on a batch of twice
  the size, [null, cond].

  Args:
    velocity_fn: the network; called once, with both conditions as one batch.
    condition: pytree of arrays with leading axis b, such as (text, mask).
    null_condition: the same structure and shapes, for the empty prompt.
    scale: 1 is the conditional velocity; a number of 1 or less saves the second
      pass, a traced one cannot.

  Source: Ho and Salimans, arXiv:2207.12598.
  """
  if isinstance(scale, int | float) and scale <= 1:
    return velocity_fn(condition)
  together = _together(velocity_fn, (null_condition, condition))

  def guided(x, sigma, timestep):
    null, cond = together(x, sigma, timestep)
    return null + jnp.asarray(scale, cond.dtype) * (cond - null)

  return guided


def perturbed_attention(
  velocity_fn: ConditionalVelocityFn,
  condition: PyTree,
  perturbed_condition: PyTree,
  null_condition: PyTree | None = None,
  *,
  scale: Real[ArrayLike, ""] = 1.0,
  pag_scale: Real[ArrayLike, ""],
  pag_adaptive_scale: Real[ArrayLike, ""] = 0.0,
) -> VelocityFn:
  """Extrapolates away from what the network makes with perturbed attention.

  v = v_null + scale (v_cond - v_null) + p (v_cond - v_perturbed), without
  `null_condition` v = v_cond + p (v_cond - v_perturbed); all from one call on
  the batch [null, cond, perturbed]. At timestep T in [0, 1000],
  p = max(0, pag_scale - pag_adaptive_scale (1000 - T)).

  Args:
    velocity_fn: as in `classifier_free`; the condition tells it which samples
      to perturb.
    perturbed_condition: `condition`, with the perturbation switched on.
    null_condition: None: no classifier-free guidance.
    scale: of the classifier-free guidance.

  Source: Ahn et al., arXiv:2403.17377, equation 17; the adaptive scale is that
    of the published SANA pipelines.
  """
  conditions = (condition, perturbed_condition)
  if null_condition is not None:
    conditions = (null_condition, *conditions)
  together = _together(velocity_fn, conditions)

  def guided(x, sigma, timestep):
    *null, cond, perturbed = together(x, sigma, timestep)
    decay = pag_adaptive_scale * (flow.NUM_TRAIN_TIMESTEPS - timestep)
    weight = flow.expand(jnp.maximum(pag_scale - decay, 0), x)
    velocity = cond + weight * (cond - perturbed)
    if null:
      velocity += (jnp.asarray(scale, cond.dtype) - 1) * (cond - null[0])
    return velocity

  return guided


def within(
  interval: tuple[float, float], guided: VelocityFn, unguided: VelocityFn
) -> VelocityFn:
  """Guides only where low < sigma < high; elsewhere one pass a step.

  A high of 1 includes sigma = 1, with which flow-Euler begins: (0, 1) is
  always.

  Raises:
    ValueError: an empty interval.

  Source: Kynkaanniemi et al., arXiv:2404.07724.
  """
  low, high = interval
  if not low < high:
    raise ValueError(
      f"guidance interval {interval} is empty: expected (low, high) with low < "
      "high, or None to guide at every step."
    )

  def limited(x, sigma, timestep):
    # All samples of a sampler's step have the same sigma.
    return jax.lax.cond(
      (low < sigma[0]) & ((sigma[0] < high) | (high >= 1)),
      lambda *args: _full_precision(guided(*args)),
      lambda *args: _full_precision(unguided(*args)),
      *(x, sigma, timestep),
    )

  return limited


def _together(
  velocity_fn: ConditionalVelocityFn, conditions: Sequence[PyTree]
) -> Callable[..., list[Float[Array, "b *shape"]]]:
  """Returns what evaluates a batch under several conditions, in one call."""
  count = len(conditions)
  stacked = jax.tree.map(lambda *a: jnp.concatenate(a), *conditions)
  conditioned = velocity_fn(stacked)

  def evaluate(*args):
    repeated = (jnp.concatenate([a] * count) for a in args)
    return jnp.split(_full_precision(conditioned(*repeated)), count)

  return evaluate


def _full_precision(velocity: Float[Array, "b *shape"]):
  # The guidance scale multiplies the rounding error of a difference.
  return velocity.astype(jnp.promote_types(velocity.dtype, jnp.float32))
