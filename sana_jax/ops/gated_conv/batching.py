"""What `jax.vmap` makes of a kernel: a larger batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array


def folded(function: Callable[..., Array]) -> Callable[..., Array]:
  """Returns the function (inputs, *weights), with a rule for `jax.vmap`.

  Pictures of all inputs become one batch; where weights differ, too, one call
  follows another.
  """
  mapped = jax.custom_batching.custom_vmap(function)

  @mapped.def_vmap
  def _(size, batched, inputs, *weights):
    args = jax.tree.map(
      lambda x, known: x if known else jnp.broadcast_to(x, (size, *x.shape)),
      (inputs, *weights),
      tuple(batched),
    )
    if any(batched[1:]):
      return jax.lax.map(lambda args: mapped(*args), args), True
    pictures = tuple(x.reshape(-1, *x.shape[2:]) for x in args[0])
    out = mapped(pictures, *weights)
    return out.reshape(size, -1, *out.shape[1:]), True

  return mapped
