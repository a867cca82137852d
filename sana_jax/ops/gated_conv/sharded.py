"""Runs a kernel on what each device has of pictures, halos included."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from sana_jax import sharding


def run(
  function: Callable[..., Array],
  inputs: tuple[Float[Array, "b h w _"], ...],
  kernel: Float[Array, "kh kw *parts c"],
  *weights: Float[Array, "*parts c"],
) -> Float[Array, "b h w c"]:
  """Computes function(inputs, kernel, *weights) over the mesh in use, if any.

  Samples, rows and channels stay where they are, and neighbours exchange rows.
  An axis that its shards do not divide is computed whole by all of them.

  Args:
    function: a depthwise convolution with zeros around.
  """
  batch, rows, _, _ = inputs[0].shape
  halo = kernel.shape[0] // 2
  one_to_one = all(x.shape[-1] == kernel.shape[-1] for x in inputs)
  axes = {
    "batch": _shards("batch", batch),
    "rows": _shards("rows", rows, least=halo),
    # Side by side, channels of values and gates are not cut alike.
    "mlp": _shards("mlp", kernel.shape[-1]) if one_to_one else 1,
  }
  if not any(sharding.shards(axis) > 1 for axis in axes):
    return function(inputs, kernel, *weights)
  sample, row, channel = (
    sharding.RULES[axis] if count > 1 else None for axis, count in axes.items()
  )
  exchange = halo > 0 and row is not None

  def local(inputs, *weights):
    if not exchange:
      return function(inputs, *weights)
    inputs = tuple(_with_neighbours(x, halo, axes["rows"]) for x in inputs)
    return function(inputs, *weights)[:, halo:-halo]

  pictures = PartitionSpec(sample, row, None, channel)
  return jax.shard_map(
    local,
    in_specs=(
      (pictures,) * len(inputs),
      *(
        PartitionSpec(*(None,) * (weight.ndim - 1), channel)
        for weight in (kernel, *weights)
      ),
    ),
    out_specs=pictures,
    check_vma=False,
  )(inputs, kernel, *weights)


def _shards(axis: str, size: int, *, least: int = 1) -> int:
  """Counts the shards that an axis of such a size is cut into."""
  count = sharding.shards(axis)
  return count if size % count == 0 and size // count >= least else 1


def _with_neighbours(
  x: Float[Array, "b h w c"], halo: int, shards: int
) -> Float[Array, "b h2 w c"]:
  """Puts rows of the neighbours above and below; zeros where there is none."""
  axis = sharding.RULES["rows"]
  down = [(i, i + 1) for i in range(shards - 1)]
  up = [(i + 1, i) for i in range(shards - 1)]
  above = jax.lax.ppermute(x[:, -halo:], axis, down)
  below = jax.lax.ppermute(x[:, :halo], axis, up)
  return jnp.concatenate([above, x, below], axis=1)
