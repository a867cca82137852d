"""Gathering shards inside a `shard_map`, and scattering sums of gradients.

The transpose of gathering is a sum over devices of which each keeps a shard.
XLA:TPU scatters as it adds only along the first axis of an array, and only in
groups that are not all devices there are; else all get the whole sum, which is
twice as much to send and needs memory for all of it.
"""

import functools

import jax
import jax.numpy as jnp
from jax import custom_derivatives
from jaxtyping import Array


def gather_shards(shard: Array, axis_name: str, dim: int) -> Array:
  """Returns the whole of an array that the devices of a mesh axis share.

  It has derivatives of any order, but no `vmap` over shards.

  Args:
    shard: the part of this device, cut along `dim`.
  """
  return custom_derivatives.linear_call(
    lambda _, shard: jax.lax.all_gather(shard, axis_name, axis=dim, tiled=True),
    lambda _, whole: _scatter_sum(whole, axis_name, dim),
    (),
    shard,
  )


def _scatter_sum(whole: Array, axis_name: str, dim: int) -> Array:
  """Returns this device's part along `dim` of a sum over a mesh axis."""
  count = jax.lax.axis_size(axis_name)
  parts = whole.reshape(*whole.shape[:dim], count, -1, *whole.shape[dim + 1 :])
  parts = jnp.moveaxis(parts, dim, 0)
  if jax.sharding.get_abstract_mesh().size != count:
    return jax.lax.psum_scatter(parts, axis_name)
  return jax.lax.platform_dependent(
    parts,
    tpu=lambda parts: _in_two_steps(parts, axis_name),
    default=lambda parts: jax.lax.psum_scatter(parts, axis_name),
  )


def _in_two_steps(parts: Array, axis_name: str) -> Array:
  """Scatters among devices that are far apart, then among neighbours."""
  outer = _near_root(parts.shape[0])
  inner = parts.shape[0] // outer
  near = [[i * inner + j for j in range(inner)] for i in range(outer)]
  far = [list(group) for group in zip(*near, strict=True)]
  scatter = functools.partial(
    jax.lax.psum_scatter, axis_name=axis_name, tiled=True
  )
  parts = scatter(parts, axis_index_groups=far)
  return scatter(parts, axis_index_groups=near)[0]


def _near_root(n: int) -> int:
  """Returns the largest divisor that is not above the square root."""
  return max(i for i in range(1, n + 1) if n % i == 0 and i * i <= n)
