"""Maps published tensors to our parameters: tables of rules, one strict engine.

A model's table is a list of `Rule`, built from its config. `load` and `save`
read the same table in opposite directions, one published tensor at a time.
"""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import tree
from sana_jax.weights import files

ArrayFn = Callable[[np.ndarray], np.ndarray]


class Transform(NamedTuple):
  """Two NumPy functions that invert each other, PyTorch layout to ours."""

  to_jax: ArrayFn
  to_torch: ArrayFn


IDENTITY = Transform(lambda w: w, lambda w: w)
# [out, in] <-> [in, out]
LINEAR = Transform(lambda w: w.T, lambda w: w.T)
# [out, in, 1, 1] <-> [in, out]
CONV1X1 = Transform(lambda w: w[:, :, 0, 0].T, lambda w: w.T[:, :, None, None])
# [out, in, kh, kw] <-> [kh, kw, in, out]
CONV = Transform(
  lambda w: w.transpose(2, 3, 1, 0), lambda w: w.transpose(3, 2, 0, 1)
)
# [channels, 1, kh, kw] <-> [kh, kw, channels]
DEPTHWISE = Transform(
  lambda w: w[:, 0].transpose(1, 2, 0), lambda w: w.transpose(2, 0, 1)[:, None]
)


@dataclass(frozen=True)
class Rule:
  """Where one of our parameters, or one block's share of it, comes from.

  Args:
    path: of our parameter, joined by "/".
    names: of the published tensors, concatenated on their axis 0.
    to_jax: from that concatenation to our parameter (or its slice `index`).
    to_torch: its inverse.
    split_sizes: lengths of the named tensors on axis 0; None: equal lengths.
    index: position on the leading axis of a parameter stacked over blocks.
    rows: (start, stop) on axis 0 when our parameter is only those rows of the
      one named tensor.
  """

  path: str
  names: tuple[str, ...]
  to_jax: ArrayFn = IDENTITY.to_jax
  to_torch: ArrayFn = IDENTITY.to_torch
  split_sizes: tuple[int, ...] | None = None
  index: int | None = None
  rows: tuple[int, int] | None = None

  def split(self, tensor: np.ndarray) -> list[np.ndarray]:
    """Cuts the concatenation of `names` back into its parts."""
    if self.split_sizes is None:
      return np.split(tensor, len(self.names))
    return np.split(tensor, np.cumsum(self.split_sizes)[:-1])


def load(
  abstract_model: Any,
  rules: Sequence[Rule],
  tensors: Mapping[str, Any],
  *,
  dtype: Any = None,
  shardings: Any = None,
  ignore: Iterable[str] = (),
  source: str = "checkpoint",
) -> Any:
  """Fills a model with published tensors; all or nothing.

  Beyond the shards this process holds, memory is needed for those of one
  parameter (the largest are filled first, while there is most room) and for one
  published tensor.

  Args:
    abstract_model: from `jax.eval_shape`; the result has its structure.
    rules: the model's table for the file's layout.
    tensors: values need `shape` and `np.asarray`; each is read as it is used.
    dtype: of the parameters; None keeps those of `abstract_model`.
    shardings: of every parameter, in the structure of `abstract_model`; None
      puts all on the default device.
    ignore: regular expressions of tensor names that are not parameters.
    source: names the file in error messages.

  Raises:
    ValueError: lists all missing, unexpected and misshapen tensors, and all
      parameters that no rule fills.
  """
  found = problems(abstract_model, rules, tensors, ignore=ignore)
  if found:
    raise ValueError(
      f"{source} does not fit the model its config describes:\n  "
      + "\n  ".join(found)
    )
  leaves = _leaves(abstract_model)
  by_path = defaultdict(list)
  for rule in rules:
    by_path[rule.path].append(rule)
  places = dict.fromkeys(leaves)
  if shardings is not None:
    places = _leaves(shardings)
  filled = {}
  for path in sorted(leaves, key=lambda p: -math.prod(leaves[p].shape)):
    leaf = jax.ShapeDtypeStruct(
      leaves[path].shape, dtype or leaves[path].dtype, sharding=places[path]
    )
    array = _fill(leaf, by_path[path], tensors)
    # The transfer keeps the host's buffer alive until it is done.
    filled[path] = jax.block_until_ready(array)
  structure = jax.tree.structure(abstract_model)
  return jax.tree.unflatten(structure, [filled[path] for path in leaves])


def problems(
  abstract_model: Any,
  rules: Sequence[Rule],
  tensors: Mapping[str, Any],
  *,
  ignore: Iterable[str] = (),
) -> list[str]:
  """Lists all that would keep `load` from filling a model; reads no values."""
  leaves = _leaves(abstract_model)
  found = _check_coverage(leaves, rules)
  expected = _expected_shapes(leaves, rules)
  for name, shape in expected.items():
    if name not in tensors:
      found.append(f"missing tensor {name} {shape}")
    elif tuple(tensors[name].shape) != shape:
      actual = tuple(tensors[name].shape)
      found.append(f"{name} has shape {actual}, expected {shape}")
  pattern = "|".join(f"(?:{regex})" for regex in ignore)
  for name in tensors:
    if name not in expected and not (pattern and re.fullmatch(pattern, name)):
      found.append(f"unexpected tensor {name} {tuple(tensors[name].shape)}")
  return found


def save(model: Any, rules: Sequence[Rule]) -> dict[str, np.ndarray]:
  """Returns the model's parameters under published names and layouts.

  Raises:
    ValueError: lists the parameters that no rule covers, and the rules without
      a parameter.
  """
  return {
    name: np.asarray(tensor) for name, tensor in published(model, rules).items()
  }


def published(model: Any, rules: Sequence[Rule]) -> files.Tensors:
  """Does what `save` does, but copies nothing until a tensor is read."""
  leaves = _leaves(model)
  uncovered = _check_coverage(leaves, rules)
  if uncovered:
    raise ValueError(
      "The table does not fit the model: " + "; ".join(uncovered)
    )
  by_name = defaultdict(list)
  for rule in rules:
    for name in rule.names:
      by_name[name].append(rule)
  shapes = _expected_shapes(leaves, rules)
  return {
    name: files.Tensor(
      shapes[name],
      np.dtype(leaves[by_name[name][0].path].dtype),
      functools.partial(_write, name, by_name[name], leaves),
    )
    for name in by_name
  }


def expected_shapes(
  abstract_model: Any, rules: Sequence[Rule]
) -> dict[str, tuple[int, ...]]:
  """Lists the tensors a complete file has, and their shapes."""
  return _expected_shapes(_leaves(abstract_model), rules)


def read(rule: Rule, tensors: Mapping[str, Any]) -> np.ndarray:
  """Computes the parameter, or one block's share of it, that a rule names."""
  parts = [np.asarray(tensors[name]) for name in rule.names]
  tensor = parts[0] if len(parts) == 1 else np.concatenate(parts)
  return rule.to_jax(tensor if rule.rows is None else tensor[slice(*rule.rows)])


def own_rules(abstract_model: Any) -> list[Rule]:
  """Returns the table of our own names and layouts, as Orbax stores them."""
  return [Rule(path, (path,)) for path in tree.leaf_names(abstract_model)]


def _leaves(model: Any) -> dict[str, Any]:
  names, leaves = tree.leaf_names(model), jax.tree.leaves(model)
  return dict(zip(names, leaves, strict=True))


def _fill(
  leaf: jax.ShapeDtypeStruct,
  rules: Sequence[Rule],
  tensors: Mapping[str, Any],
) -> jax.Array:
  """Reads one parameter into the shards that this process holds of it."""
  if leaf.sharding is None:
    whole = tuple((0, n) for n in leaf.shape)
    return jnp.asarray(_host_shards(leaf, rules, tensors, {whole})[whole])
  regions = {
    device: _resolve(index, leaf.shape)
    for device, index in leaf.sharding.addressable_devices_indices_map(
      leaf.shape
    ).items()
  }
  shards = _host_shards(leaf, rules, tensors, set(regions.values()))
  return jax.make_array_from_single_device_arrays(
    leaf.shape,
    leaf.sharding,
    [jax.device_put(shards[r], device) for device, r in regions.items()],
  )


# Start and stop on every axis.
_Region = tuple[tuple[int, int], ...]


def _host_shards(
  leaf: jax.ShapeDtypeStruct,
  rules: Sequence[Rule],
  tensors: Mapping[str, Any],
  regions: set[_Region],
) -> dict[_Region, np.ndarray]:
  """Reads regions of one parameter, every tensor at most once."""
  shards = {
    region: np.empty([stop - start for start, stop in region], leaf.dtype)
    for region in regions
  }
  for rule in rules:
    targets = [
      # A stacked parameter's first axis counts blocks.
      (shard, region)
      if rule.index is None
      else (shard[rule.index - region[0][0], ...], region[1:])
      for region, shard in shards.items()
      if rule.index is None or region[0][0] <= rule.index < region[0][1]
    ]
    if not targets:
      continue
    tensor = read(rule, tensors)
    for target, region in targets:
      _copy(target, tensor[tuple(slice(*bounds) for bounds in region)])
  return shards


def _resolve(index: tuple[slice, ...], shape: tuple[int, ...]) -> _Region:
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))


# Columns that are transposed together: their cache lines stay in the cache,
# which is four times faster than taking a whole large matrix.
_SLAB = 64


def _copy(target: np.ndarray, source: np.ndarray) -> None:
  """Copies and casts, without a copy of the whole in either dtype."""
  if source.ndim < 2 or source.flags.c_contiguous:
    target[...] = source
    return
  for start in range(0, target.shape[-1], _SLAB):
    part = (..., slice(start, start + _SLAB))
    target[part] = source[part].astype(target.dtype)


def _write(
  name: str, rules: Sequence[Rule], leaves: Mapping[str, Any]
) -> np.ndarray:
  """Returns one published tensor, in C order."""
  if rules[0].rows is not None:
    ordered = sorted(rules, key=lambda rule: rule.rows)
    parts = [rule.to_torch(_parameter(rule, leaves)) for rule in ordered]
    return np.ascontiguousarray(np.concatenate(parts))
  (rule,) = rules
  parts = rule.split(rule.to_torch(_parameter(rule, leaves)))
  part = parts[rule.names.index(name)]
  return np.ascontiguousarray(part).reshape(part.shape)


def _parameter(rule: Rule, leaves: Mapping[str, Any]) -> np.ndarray:
  leaf = leaves[rule.path]
  # Sliced where it is: only one block's share comes to the host.
  return np.asarray(leaf if rule.index is None else leaf[rule.index])


def _check_coverage(leaves, rules: Sequence[Rule]) -> list[str]:
  indices = defaultdict(list)
  for rule in rules:
    indices[rule.path].append(rule.index)
  problems = [
    f"rule for {path}, which the model does not have"
    for path in indices
    if path not in leaves
  ]
  for path, leaf in leaves.items():
    stacked = indices[path] != [None]
    wanted = list(range(leaf.shape[0])) if stacked and leaf.ndim else [None]
    if sorted(indices[path], key=str) != sorted(wanted, key=str):
      problems.append(
        f"parameter {path} {tuple(leaf.shape)} is not filled exactly once"
      )
  return problems


def _expected_shapes(leaves, rules: Sequence[Rule]) -> dict[str, tuple]:
  shapes: dict[str, tuple[int, ...]] = {}
  for rule in rules:
    if rule.path not in leaves:
      continue
    shape = leaves[rule.path].shape
    shape = shape if rule.index is None else shape[1:]
    # A view without memory of its own: only its shape is of interest.
    tensor = rule.to_torch(np.broadcast_to(np.float32(0), shape))
    if rule.rows is not None:
      name, length = rule.names[0], rule.rows[1]
      length = max(length, shapes.get(name, (0,))[0])
      shapes[name] = (length, *tensor.shape[1:])
      continue
    for name, part in zip(rule.names, rule.split(tensor), strict=True):
      shapes[name] = part.shape
  return shapes
