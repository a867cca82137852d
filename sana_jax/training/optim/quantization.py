"""Arrays of 8 bits: codes between the least and the largest of a block."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

# Of the published CAME-8bit; its authors' code makes blocks of 2048 rows, and
# so of millions of elements. These are blocks of elements.
BLOCK_SIZE = 2048


class Blocks(NamedTuple):
  """A quantised array, in the shape of what it stands for.

  Attributes:
    codes: value = minimum + code * scale.
    scale: of every block; the axis that blocks run along counts them.
    minimum: of every block.
  """

  codes: UInt8[Array, "..."]
  scale: Float[Array, "..."]
  minimum: Float[Array, "..."]


def quantize(x: Float[Array, "..."], axis: int) -> Blocks:
  """Rounds to 256 levels per block: an error of at most half a quantum.

  An axis of n elements has ceil(n / BLOCK_SIZE) blocks of (almost) one size, so
  that a shard of the other axes holds whole blocks. A block of equal values has
  the quantum 0 and is exact.

  Args:
    axis: that blocks run along.

  Source: SANA-1.5, arXiv:2501.18427, section on CAME-8bit.
  """
  blocks, at = _split(x, axis)
  minimum = blocks.min(at + 1, keepdims=True)
  scale = (blocks.max(at + 1, keepdims=True) - minimum) / 255
  codes = jnp.round((blocks - minimum) / jnp.where(scale > 0, scale, 1))
  return Blocks(
    _merge(codes.astype(jnp.uint8), at, x.shape[at]),
    scale.squeeze(at + 1),
    minimum.squeeze(at + 1),
  )


def dequantize(blocks: Blocks, axis: int) -> Float[Array, "..."]:
  """Returns minimum + code * scale."""
  codes, at = _split(blocks.codes, axis)
  scale, minimum = (
    jnp.expand_dims(value, at + 1) for value in (blocks.scale, blocks.minimum)
  )
  values = codes.astype(jnp.float32) * scale + minimum
  return _merge(values, at, blocks.codes.shape[at])


def _split(x: jax.Array, axis: int) -> tuple[jax.Array, int]:
  """Splits an axis into (blocks, elements); the last repeats its last one."""
  at = axis % x.ndim
  length = x.shape[at]
  count = -(-length // BLOCK_SIZE)
  size = -(-length // count)
  if count * size != length:
    widths = [(0, 0)] * x.ndim
    widths[at] = (0, count * size - length)
    x = jnp.pad(x, widths, mode="edge")
  return x.reshape(*x.shape[:at], count, size, *x.shape[at + 1 :]), at


def _merge(blocks: jax.Array, at: int, length: int) -> jax.Array:
  shape = blocks.shape
  merged = blocks.reshape(*shape[:at], -1, *shape[at + 2 :])
  return jax.lax.slice_in_dim(merged, 0, length, axis=at)
