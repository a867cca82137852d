"""Moving whole arrays to shards and back."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding


def place(arrays: Any, shardings: Any) -> Any:
  """Puts arrays that every process holds, alike, where `shardings` says."""

  def put(array: Any, target: NamedSharding) -> jax.Array:
    whole = np.asarray(array)
    return jax.make_array_from_callback(
      whole.shape, target, lambda index: whole[index]
    )

  return jax.tree.map(put, arrays, shardings)


def gather(arrays: Any) -> Any:
  """Returns the whole arrays to process 0, and None to all others.

  All processes must call it: what other processes hold is sent to each, one
  array after the other, but only the first keeps more than one of them. Those
  in the memory of hosts come to devices.
  """
  is_first = jax.process_index() == 0
  leaves, structure = jax.tree.flatten(arrays)
  kept = []
  for leaf in leaves:
    leaf = whole = _on_device(leaf)
    if not leaf.is_fully_addressable:
      whole = multihost_utils.process_allgather(leaf, tiled=True)
    if is_first:
      kept.append(whole)
    del whole
  return jax.tree.unflatten(structure, kept) if is_first else None


def _on_device(array: jax.Array) -> jax.Array:
  place = array.sharding
  if place.memory_kind != "pinned_host":
    return array
  return jax.device_put(array, place.with_memory_kind("device"))
