"""Placing parameters by a model's table, and checking that it did something."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from sana_jax import tree
from sana_jax.sharding import rules as rules_lib

ParamAxes = Sequence[tuple[str, rules_lib.Axes]]

# A mesh axis must cut at least this share of the parameters.
_LEAST_SHARE = 0.5


class _Leaf(NamedTuple):
  """A parameter; `axes` are logical, one for each of its shape."""

  name: str
  size: int
  axes: rules_lib.Axes
  shape: tuple[int, ...]


def param_shardings(
  abstract: Any,
  param_axes: ParamAxes,
  mesh: Mesh,
  rules: rules_lib.Rules = rules_lib.RULES,
) -> Any:
  """Gives every leaf of `abstract` a NamedSharding from the table.

  The first matching row wins. Of several mesh axes, those are kept from the
  first on that divide the leaf's axis; what none divides is replicated. See
  `check_every_axis_cuts`.

  Raises:
    ValueError: a leaf that no row matches, or a row of the wrong rank.
  """

  def place(name: str, leaf: Any) -> NamedSharding:
    axes = _row(name, leaf.shape, param_axes)
    named = [
      _dividing(rules_lib.mesh_axes(axis, rules), n, mesh.shape)
      for axis, n in zip(axes, leaf.shape, strict=True)
    ]
    return NamedSharding(mesh, rules_lib.partition_spec(named, mesh.shape))

  return tree.map_with_names(place, abstract)


def check_every_axis_cuts(
  abstract: Mapping[str, Any],
  param_axes: Mapping[str, ParamAxes],
  mesh: Mesh,
) -> None:
  """Checks that no mesh axis leaves most of the parameters whole.

  Args:
    abstract: {component name: its arrays, or their shapes}.
    param_axes: {component name: its table}.

  Raises:
    ValueError: an axis that does; it says which size would do.
  """
  leaves = [
    _Leaf(
      f"{component}/{name}",
      leaf.size,
      _row(name, leaf.shape, param_axes[component]),
      leaf.shape,
    )
    for component, arrays in abstract.items()
    for name, leaf in zip(
      tree.leaf_names(arrays), jax.tree.leaves(arrays), strict=True
    )
  ]
  for axis in ("fsdp", "tensor"):
    size = mesh.shape.get(axis, 1)
    share = _share_cut(leaves, axis, dict(mesh.shape))
    if size == 1 or share >= _LEAST_SHARE:
      continue
    fitting = [
      n
      for n in range(1, size)
      if size % n == 0
      and (
        n == 1
        or _share_cut(leaves, axis, {**mesh.shape, axis: n}) >= _LEAST_SHARE
      )
    ]
    raise ValueError(_cuts_too_little(leaves, axis, mesh, share, fitting[-1]))


def _share_cut(leaves, axis: str, sizes: Mapping[str, int]) -> float:
  """The share of the parameters that mesh axis `axis` cuts."""
  cut = total = 0
  for leaf in leaves:
    total += leaf.size
    cut += leaf.size * any(
      axis in _dividing(rules_lib.mesh_axes(logical), n, sizes)
      for logical, n in zip(leaf.axes, leaf.shape, strict=True)
    )
  return cut / max(total, 1)


def _cuts_too_little(leaves, axis: str, mesh: Mesh, share, bound: int) -> str:
  size = mesh.shape[axis]
  # By logical axis and size, the largest parameter that would be cut there.
  whole: dict[tuple[str, int], str] = {}
  for leaf in sorted(leaves, key=lambda leaf: -leaf.size):
    for logical, n in zip(leaf.axes, leaf.shape, strict=True):
      if axis in rules_lib.mesh_axes(logical) and n % size:
        whole.setdefault((logical, n), leaf.name)
  which = ", ".join(
    f"{logical} of {n}, such as in {name}"
    for (logical, n), name in sorted(whole.items())
  )
  common = math.gcd(*(n for _, n in whole)) if whole else 1
  divisors = ", ".join(map(str, rules_lib.divisors(common)))
  data = mesh.shape["data"] * size // bound
  remedy = (
    f"set data={data}, {axis}={bound}"
    if bound > 1
    else f"set {axis}=1, and data={data}"
  )
  why = " (each copy of the model sharded, HSDP)" if axis == "fsdp" else ""
  return (
    f"mesh axis {axis}={size} cuts {share:.0%} of the parameters; it does not "
    f"divide {which}. Sizes that divide all of these: {divisors}. With this "
    f"number of devices, {remedy}{why}."
  )


def _row(
  name: str, shape: tuple[int, ...], param_axes: ParamAxes
) -> rules_lib.Axes:
  row = next((r for r in param_axes if re.search(r[0], name)), None)
  if row is None:
    raise ValueError(f"No sharding row matches {name} {shape}; add one.")
  pattern, axes = row
  if len(axes) != len(shape):
    raise ValueError(
      f"Sharding row {pattern!r} has {len(axes)} axes, but {name} has shape "
      f"{shape}."
    )
  return axes


def _dividing(
  names: tuple[str, ...], n: int, sizes: Mapping[str, int]
) -> tuple[str, ...]:
  """Drops mesh axes from the end until their shards divide `n`."""
  while n % rules_lib.size_of(names, sizes):
    names = names[:-1]
  return names
