"""The gradient of a batch that is taken in parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sana_jax.training import scalars as scalars_lib


def value_and_grad(
  loss_fn: Callable[..., Any], parts: int
) -> Callable[..., Any]:
  """Like jax.value_and_grad(loss_fn, has_aux=True), in `parts` of the batch.

  Loss, gradient and plain scalars are means over the parts, one after the
  other; `Ratio`s add up. For a loss that is a mean over samples, and draws no
  noise, that is the value of the whole batch. Part i draws from fold_in(key,
  i), and a batch in one part from the key itself.

  Part i has the rows i, i + parts, ...: of a batch that is sharded by rows,
  every device then has its share of every part, and nothing is sent.

  Args:
    loss_fn: (params, fixed, key, batch) -> (loss, scalars).

  Raises:
    ValueError: when called, a batch that does not divide.
  """
  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  if parts == 1:
    return grad_fn

  def accumulated(params: Any, fixed: Any, key: jax.Array, batch: Any):
    def add(total, part):
      index, rows = part
      part_key = jax.random.fold_in(key, index)
      (loss, aux), grads = grad_fn(params, fixed, part_key, rows)
      return jax.tree.map(jnp.add, total, (grads, loss)), aux

    zeros = jax.tree.map(jnp.zeros_like, (params, jnp.float32(0)))
    (grads, loss), aux = jax.lax.scan(
      add, zeros, (jnp.arange(parts), jax.tree.map(split, batch))
    )
    mean = jax.tree.map(lambda x: x / parts, (loss, grads))
    return (mean[0], _reduce(aux)), mean[1]

  def split(x: jax.Array) -> jax.Array:
    if x.shape[0] % parts:
      raise ValueError(
        f"batch_size ({x.shape[0]}) must be a multiple of optim.accumulation "
        f"({parts})."
      )
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

  return accumulated


def _reduce(aux: scalars_lib.Scalars) -> scalars_lib.Scalars:
  """Sums ratios over the parts, and averages the rest."""
  return {
    name: jax.tree.map(jnp.sum, value)
    if isinstance(value, scalars_lib.Ratio)
    else jnp.mean(value)
    for name, value in aux.items()
  }
