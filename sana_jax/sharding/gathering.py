"""Gathering shards inside a `shard_map`, and scattering sums of gradients.

Each is the transpose of the other. XLA:TPU does both along the first axis of an
array, in groups that are not all devices there are. Else it may write them as a
sum of whole arrays that every device gets: twice as much to send, and memory
for all of it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array


def gather_shards(shard: Array, axis_name: str, dim: int) -> Array:
  """Returns the whole of an array that the devices of a mesh axis share.

  Args:
    shard: the part of this device, cut along `dim`.
  """
  if jax.sharding.get_abstract_mesh().size == jax.lax.axis_size(axis_name):
    parts = jax.lax.platform_dependent(
      shard,
      tpu=lambda shard: _in_two_steps(shard, axis_name),
      default=lambda shard: jax.lax.all_gather(shard, axis_name),
    )
  else:
    parts = jax.lax.all_gather(shard, axis_name)
  parts = jnp.moveaxis(parts, 0, dim)
  return parts.reshape(*shard.shape[:dim], -1, *shard.shape[dim + 1 :])


def _in_two_steps(shard: Array, axis_name: str) -> Array:
  """Gathers from neighbours, then from devices that are farther apart.

  Of a prime number of devices, the first step takes all and the second none:
  the result is right, and sums may be written whole, as the module says. Slices
  of TPUs have 1, 4, 8 or more chips: such a number is a part of one.
  """
  count = jax.lax.axis_size(axis_name)
  outer = _near_root(count)
  inner = count // outer
  near = [[i * inner + j for j in range(inner)] for i in range(outer)]
  far = [list(group) for group in zip(*near, strict=True)]
  parts = shard[None]
  for groups in (near, far):
    parts = jax.lax.all_gather(
      parts, axis_name, axis_index_groups=groups, tiled=True
    )
  return parts


def _near_root(n: int) -> int:
  """Returns the largest divisor that is not above the square root."""
  return max(i for i in range(1, n + 1) if n % i == 0 and i * i <= n)
