"""Placing arrays on devices: a mesh, and tables from names to axes.

A model file ends with PARAM_AXES, rows of (regex, logical axes). Rules map
logical axes to mesh axes. Modules themselves know nothing of placement.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sana_jax import tree

Axes = tuple[str | None, ...]
ParamAxes = Sequence[tuple[str, Axes]]
Rules = Mapping[str, str | tuple[str, ...] | None]

# Parameters are sharded along one width (fully sharded data parallelism); the
# expanded axes stay whole until a config maps them to a tensor axis.
FSDP_RULES: Rules = {
  "batch": ("data", "fsdp"),
  "layers": None,
  "embed": "fsdp",
  "heads": None,
  "mlp": None,
  "vocab": None,
}
REPLICATED_RULES: Rules = dict.fromkeys(FSDP_RULES)


def make_mesh(
  axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """Arranges devices; one size may be -1 and takes what is left.

  Raises:
    ValueError: the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(axes)
  free = [name for name, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or len(devices) % max(known, 1) or known < 1:
    raise ValueError(
      f"mesh {dict(axes)} does not fit {len(devices)} devices: sizes must "
      f"divide it, with at most one -1."
    )
  for name in free:
    sizes[name] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise ValueError(
      f"mesh {dict(axes)} uses {math.prod(sizes.values())} of {len(devices)} "
      f"devices; set one axis to -1 to use them all."
    )
  array = np.asarray(devices).reshape(tuple(sizes.values()))
  return Mesh(array, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def param_shardings(
  abstract: Any, param_axes: ParamAxes, mesh: Mesh, rules: Rules = FSDP_RULES
) -> Any:
  """Gives every leaf of `abstract` a NamedSharding from the table.

  The first matching row wins. An axis whose size the mesh does not divide is
  replicated (SANA's width 2240 allows at most 64-fold sharding).

  Raises:
    ValueError: a leaf that no row matches, or a row of the wrong rank.
  """

  def place(name: str, leaf: Any) -> NamedSharding:
    row = next((r for r in param_axes if re.search(r[0], name)), None)
    if row is None:
      raise ValueError(f"No sharding row matches {name} {leaf.shape}; add one.")
    pattern, axes = row
    if len(axes) != leaf.ndim:
      raise ValueError(
        f"Sharding row {pattern!r} has {len(axes)} axes, but {name} has shape "
        f"{leaf.shape}."
      )
    mapped = [_mesh_axis(axis, rules) for axis in axes]
    fits = [
      axis
      if _axis_size(mesh, axis) and n % _axis_size(mesh, axis) == 0
      else None
      for axis, n in zip(mapped, leaf.shape, strict=True)
    ]
    while fits and fits[-1] is None:  # XLA drops trailing None: so do we.
      fits.pop()
    return NamedSharding(mesh, PartitionSpec(*fits))

  return tree.map_with_names(place, abstract)


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


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, rules: Rules = FSDP_RULES) -> NamedSharding:
  """The sharding of a batch: the first axis over all data-like mesh axes."""
  return NamedSharding(mesh, PartitionSpec(_mesh_axis("batch", rules)))


def _mesh_axis(axis: str | None, rules: Rules):
  if axis is None:
    return None
  if axis not in rules:
    raise ValueError(
      f"No sharding rule for logical axis {axis!r}; rules: {sorted(rules)}."
    )
  return rules[axis]


def _axis_size(mesh: Mesh, axis: str | tuple[str, ...] | None) -> int:
  if axis is None:
    return 0
  names = (axis,) if isinstance(axis, str) else axis
  return math.prod(mesh.shape[name] for name in names)
