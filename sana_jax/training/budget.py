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

  Args:
    abstract: leaves have a shape, a dtype, and perhaps a sharding; those
      without one are whole on the device.
  """
  return sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(abstract))


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


def _shard_bytes(leaf: Any) -> int:
  shape = leaf.shape
  if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) and leaf.sharding:
    shape = leaf.sharding.shard_shape(leaf.shape)
  return math.prod(shape) * np.dtype(leaf.dtype).itemsize
