"""How much memory of a device a run needs, by what it is for.

Sizes come from shapes and shardings, so nothing needs to be allocated, and no
device need exist that the shardings speak of.
"""

import math
from typing import Any

import jax
import numpy as np

from sana_jax.training import step as step_lib


def per_device_bytes(abstract: Any) -> int:
  """Sums the bytes of the leaves' shards, the largest device's.

  What is in the host's memory does not count: see `host_bytes`.

  Args:
    abstract: leaves have a shape, a dtype, and perhaps a sharding; those
      without one are whole on the device.
  """
  leaves = jax.tree.leaves(abstract)
  return sum(_shard_bytes(leaf) for leaf in leaves if not _is_on_host(leaf))


def host_bytes(abstract: Any) -> int:
  """Sums the bytes of shards that are a device's in the host's memory."""
  leaves = jax.tree.leaves(abstract)
  return sum(_shard_bytes(leaf) for leaf in leaves if _is_on_host(leaf))


def state_budget(state: step_lib.TrainState) -> dict[str, int]:
  """Returns the bytes per device of the parts of a state.

  Args:
    state: arrays, or abstract ones such as `Program.state`.
  """
  # Without an average there are no arrays, and so no bytes.
  return {
    "parameters": per_device_bytes(state.params),
    "average": per_device_bytes(state.ema),
    "optimiser": per_device_bytes(state.opt_state),
  }


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
  return getattr(leaf, "sharding", None)


def _is_on_host(leaf: Any) -> bool:
  place = _sharding(leaf)
  return place is not None and place.memory_kind == "pinned_host"


def _shard_bytes(leaf: Any) -> int:
  shape, place = leaf.shape, _sharding(leaf)
  if place is not None:
    shape = place.shard_shape(leaf.shape)
  return math.prod(shape) * np.dtype(leaf.dtype).itemsize
