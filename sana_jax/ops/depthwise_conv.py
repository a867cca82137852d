"""Depthwise convolution as shifted multiply-adds."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from sana_jax import sharding


def depthwise_conv(
  x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"]
) -> Float[Array, "b h w c"]:
  """Filters every channel on its own, stride 1, zero padding to keep the size.

  out[y, x, c] = sum_ij kernel[i, j, c] * in[y + i - kh//2, x + j - kw//2, c]

  Not a grouped `lax.conv`: on CPU that runs on one core and is 10-60 times
  slower, and on TPU a channel-sharded kernel makes XLA gather the global batch.
  The sum of kh * kw shifted products fuses, shards and differentiates (forward
  and reverse) like any element-wise expression.

  Where a mesh in use shards the rows, neighbours exchange kh // 2 of them.

  Raises:
    ValueError: an even kernel side, which has no centre; rows that do not
      divide over the mesh, or fewer on a device than a neighbour needs.
  """
  kh, kw, _ = kernel.shape
  if kh % 2 == 0 or kw % 2 == 0:
    raise ValueError(
      f"depthwise_conv: kernel sides must be odd, got {(kh, kw)}."
    )
  halo, shards = kh // 2, sharding.shards("rows")
  if shards == 1 or halo == 0:
    return _filter(_pad(x, halo, kw // 2), kernel)
  if x.shape[1] % shards or x.shape[1] // shards < halo:
    raise ValueError(
      f"depthwise_conv: {x.shape[1]} rows do not divide over sequence={shards} "
      f"with at least {halo} on each device; use a smaller sequence axis."
    )
  # Left to the compiler, the shifts of sharded rows become permutations of
  # whole shards, one for every row of the kernel.
  rows = PartitionSpec(None, sharding.RULES["rows"])
  return jax.shard_map(
    functools.partial(_filter_shard, shards=shards),
    in_specs=(rows, PartitionSpec()),
    out_specs=rows,
    axis_names=set(sharding.RULES["rows"]),
  )(x, kernel)


def _filter_shard(
  x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"], *, shards: int
) -> Float[Array, "b h w c"]:
  """Filters the rows of one device, after an exchange with its neighbours."""
  halo, axis = kernel.shape[0] // 2, sharding.RULES["rows"]
  down = [(i, i + 1) for i in range(shards - 1)]
  up = [(i + 1, i) for i in range(shards - 1)]
  # Who has no neighbour receives zeros: the padding of the picture.
  above = jax.lax.ppermute(x[:, -halo:], axis, down)
  below = jax.lax.ppermute(x[:, :halo], axis, up)
  x = jnp.concatenate([above, x, below], axis=1)
  return _filter(_pad(x, 0, kernel.shape[1] // 2), kernel)


def _pad(
  x: Float[Array, "b h w c"], rows: int, columns: int
) -> Float[Array, "b h2 w2 c"]:
  return jnp.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))


def _filter(
  padded: Float[Array, "b h2 w2 c"], kernel: Float[Array, "kh kw c"]
) -> Float[Array, "b h w c"]:
  """Filters an array that is already padded."""
  kh, kw, channels = kernel.shape
  height, width = padded.shape[1] - kh + 1, padded.shape[2] - kw + 1
  shifted = (
    padded[:, i : i + height, j : j + width]
    * kernel[i, j].reshape(1, 1, 1, channels)
    for i in range(kh)
    for j in range(kw)
  )
  return sum(shifted, start=jnp.zeros((), padded.dtype))
