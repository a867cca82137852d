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
  """Returns arrays of which this process holds the whole.

  All processes must call it: what other processes hold is sent to each.
  """
  return jax.tree.map(
    lambda array: (
      array
      if array.is_fully_addressable
      else multihost_utils.process_allgather(array, tiled=True)
    ),
    arrays,
  )
