"""Which devices take part in a collective, and along which mesh axes.

XLA writes groups of devices in four ways: as lists, as a permuted range, as
axes of a mesh of its own, and, for a permutation, as pairs.
"""

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

_LISTS = re.compile(r"replica_groups=\{(\{.*?\}|)\}")
_RANGE = re.compile(
  r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
)
_MESH = re.compile(r"replica_groups=@?mesh\[(.*?)\]([^{]*)\{([^}]*)\}")
_MESH_AXIS = re.compile(r"['\"]?(\w+)['\"]?=(\d+)")
_MESH_IDS = re.compile(r"\(?\[([\d,]+)\](?:T\(([\d,]+)\))?")
_SUB_AXIS = re.compile(r"['\"]?(\w+)['\"]?(?::\((\d+)\)(\d+))?")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def parse(attributes: str, num_devices: int) -> list[tuple[int, ...]]:
  """Returns the groups of an instruction, as positions in the mesh's order.

  Args:
    attributes: of the instruction, as text.

  Raises:
    ValueError: groups written in no way known here.
  """
  found = _PAIRS.search(attributes)
  if found:
    numbers = _numbers(found[1])
    return list(zip(numbers[::2], numbers[1::2], strict=True))
  found = _RANGE.search(attributes)
  if found:
    shape, iota, order = found.groups()
    return _rows(_permuted(iota, order).reshape(_numbers(shape)))
  found = _MESH.search(attributes)
  if found:
    return _along(*found.groups())
  found = _LISTS.search(attributes)
  if found and not found[1]:
    return [tuple(range(num_devices))]
  if found:
    return [
      tuple(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", found[1])
    ]
  raise ValueError(
    f"Cannot read which devices take part in a collective: {attributes[:200]}"
  )


def axes_of(
  groups: Sequence[tuple[int, ...]], mesh: Mapping[str, int]
) -> tuple[str, ...]:
  """Returns the mesh axes along which the members of a group differ.

  Args:
    mesh: the size of every axis, in the mesh's order.
  """
  shape = tuple(mesh.values())
  varying = np.zeros(len(shape), bool)
  for group in groups:
    places = np.stack(np.unravel_index(np.asarray(group), shape))
    varying |= (places != places[:, :1]).any(axis=1)
  return tuple(name for name, moves in zip(mesh, varying, strict=True) if moves)


def _along(sizes: str, ids: str, axes: str) -> list[tuple[int, ...]]:
  """Returns the groups that span some axes, or parts of them, of a mesh."""
  mesh = {name: int(size) for name, size in _MESH_AXIS.findall(sizes)}
  permuted = _MESH_IDS.search(ids)
  if permuted:
    devices = _permuted(*permuted.groups())
  else:
    listed = _numbers(ids)
    devices = np.asarray(listed or range(math.prod(mesh.values())))
  # An axis of which a part is spanned becomes three: before, part, after.
  parts = {name: [(size, False)] for name, size in mesh.items()}
  for name, before, size in _SUB_AXIS.findall(axes):
    whole = mesh[name]
    if size:
      rest = whole // (int(before) * int(size))
      parts[name] = [(int(before), False), (int(size), True), (rest, False)]
    else:
      parts[name] = [(whole, True)]
  flat = [part for pieces in parts.values() for part in pieces]
  array = devices.reshape([size for size, _ in flat])
  spanned = [i for i, (_, spans) in enumerate(flat) if spans]
  kept = [i for i, (_, spans) in enumerate(flat) if not spans]
  members = math.prod(flat[i][0] for i in spanned)
  return _rows(array.transpose(kept + spanned).reshape(-1, members))


def _permuted(iota: str, order: str | None) -> np.ndarray:
  shape = _numbers(iota)
  array = np.arange(math.prod(shape)).reshape(shape)
  return array.transpose(_numbers(order)) if order else array


def _rows(array: np.ndarray) -> list[tuple[int, ...]]:
  return [tuple(row) for row in array.tolist()]


def _numbers(text: str) -> list[int]:
  return [int(number) for number in re.findall(r"\d+", text)]
