"""CAME, as SANA is trained with it, and with a first moment of 8 bits."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from sana_jax.training.optim import quantization

# Added to the squared gradient and to the squared residual; the largest root
# mean square of an update before its momentum.
_EPS, _EPS_RESIDUAL, _CLIP = 1e-30, 1e-16, 1.0
# Smaller matrices keep a first moment of 32 bits: they are few bytes.
_LEAST_8BIT_SIZE = 16384


class MatrixState(NamedTuple):
  """State of a matrix.

  Attributes:
    row: mean over the last axis.
    column: mean over the axis before it.
  """

  mu: Float[Array, "..."] | quantization.Blocks
  row: Float[Array, "..."]
  column: Float[Array, "..."]
  residual_row: Float[Array, "..."]
  residual_column: Float[Array, "..."]


class VectorState(NamedTuple):
  """State of what is no matrix."""

  mu: Float[Array, "..."]
  nu: Float[Array, "..."]


State = MatrixState | VectorState


def scale_by_came(
  *,
  b1: float,
  b2: float,
  b3: float,
  block_axis: Callable[[str], int] | None = None,
) -> optax.GradientTransformation:
  """Divides by factored second moments and by the instability of the update.

  For a matrix with gradient g, where E decays its argument's average:

    row, column = E_b2 of the means of g^2 + 1e-30 along the axes
    u  = g / sqrt(row column / mean(row)), scaled down to a rms of at most 1
    mu = E_b1 u
    residual_row, residual_column = E_b3 of the means of (u - mu)^2 + 1e-16
    update = mu / sqrt(residual_row residual_column / mean(residual_row))

  For anything else nu = E_b2 (g^2 + 1e-30), u = g / sqrt(nu) scaled down, and
  the update is mu. Averages start at 0 without correction, so the first updates
  are large (a root mean square of 11 at step 1, 1.1 at step 500): warm up.

  Leaves are {name: array} without an axis of layers. What has two axes, or is a
  kernel of 1x1, is a matrix; published CAME factors larger kernels too, the
  implementation that SANA is trained with does not.

  Args:
    block_axis: name -> axis that the 8-bit blocks of the first moment run
      along; None: all of 32 bits. The 8-bit one is rounded after it was used.

  Source: Luo et al., arXiv:2307.02047, algorithm 2; NVlabs/Sana,
  diffusion/utils/optimizer.py, CAMEWrapper and CAME8BitWrapper.
  """

  def axis_of(name: str, gradient: jax.Array) -> int | None:
    small = gradient.size <= _LEAST_8BIT_SIZE
    if block_axis is None or small or not is_matrix(gradient.shape):
      return None
    return block_axis(name)

  def init(params):
    return {name: _init(p, axis_of(name, p)) for name, p in params.items()}

  def update(updates, state, params=None):
    del params
    results = {}
    for name, gradient in updates.items():
      axis = axis_of(name, gradient)
      mu = state[name].mu
      old = state[name]._replace(
        mu=mu if axis is None else quantization.dequantize(mu, axis)
      )
      results[name] = _update(gradient.astype(jnp.float32), old, b1, b2, b3)
      if axis is not None:
        step, new = results[name]
        new = new._replace(mu=quantization.quantize(new.mu, axis))
        results[name] = step, new
    return (
      {name: step for name, (step, _) in results.items()},
      {name: new for name, (_, new) in results.items()},
    )

  return optax.GradientTransformation(init, update)


def is_matrix(shape: tuple[int, ...]) -> bool:
  """True for two axes, or the four of a convolution of 1x1."""
  return len(shape) == 2 or (len(shape) == 4 and shape[:2] == (1, 1))


def _init(param: jax.Array, axis: int | None) -> State:
  mu = jnp.zeros(param.shape, jnp.float32)
  if not is_matrix(param.shape):
    return VectorState(mu, jnp.zeros(param.shape, jnp.float32))
  row = jnp.zeros(param.shape[:-1], jnp.float32)
  column = jnp.zeros((*param.shape[:-2], param.shape[-1]), jnp.float32)
  if axis is not None:
    mu = quantization.quantize(mu, axis)
  return MatrixState(mu, row, column, row, column)


def _update(
  gradient: jax.Array, old: State, b1: float, b2: float, b3: float
) -> tuple[jax.Array, State]:
  """One step of one leaf; the first moment is of 32 bits."""
  square = jnp.square(gradient) + _EPS
  if not is_matrix(gradient.shape):
    nu = _decay(old.nu, square, b2)
    mu = _decay(old.mu, _clip(gradient * jax.lax.rsqrt(nu)), b1)
    return mu, VectorState(mu, nu)
  row = _decay(old.row, square.mean(-1), b2)
  column = _decay(old.column, square.mean(-2), b2)
  normalized = _clip(_divide(gradient, row, column))
  mu = _decay(old.mu, normalized, b1)
  residual = jnp.square(normalized - mu) + _EPS_RESIDUAL
  residual_row = _decay(old.residual_row, residual.mean(-1), b3)
  residual_column = _decay(old.residual_column, residual.mean(-2), b3)
  step = _divide(mu, residual_row, residual_column)
  return step, MatrixState(mu, row, column, residual_row, residual_column)


def _decay(average: jax.Array, value: jax.Array, b: float) -> jax.Array:
  return b * average + (1 - b) * value


def _clip(update: jax.Array) -> jax.Array:
  rms = jnp.sqrt(jnp.mean(jnp.square(update)))
  return update / jnp.maximum(1.0, rms / _CLIP)


def _divide(x: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
  """Divides by the root of what the two means say of every element."""
  of_row = jax.lax.rsqrt(row / row.mean(-1, keepdims=True))
  of_column = jax.lax.rsqrt(column)
  return x * of_row[..., :, None] * of_column[..., None, :]
