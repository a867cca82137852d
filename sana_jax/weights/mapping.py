"""Maps published tensors to our parameters: tables of rules, one strict engine.

A model's table is a list of `Rule`, built from its config. `load` and `save`
read the same table in opposite directions.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import tree

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
  ignore: Iterable[str] = (),
  source: str = "checkpoint",
) -> Any:
  """Fills a model with published tensors; all or nothing.

  Args:
    abstract_model: from `jax.eval_shape`; the result has its structure.
    rules: the model's table for the file's layout.
    tensors: values need `shape` and `np.asarray`; each is read as it is used,
      so that a lazy mapping keeps memory at one copy.
    dtype: of the parameters; None keeps those of `abstract_model`.
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
  filled = [
    _fill(leaf, by_path[path], tensors, dtype or leaf.dtype)
    for path, leaf in leaves.items()
  ]
  return jax.tree.unflatten(jax.tree.structure(abstract_model), filled)


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
  leaves = _leaves(model)
  uncovered = _check_coverage(leaves, rules)
  if uncovered:
    raise ValueError(
      "The table does not fit the model: " + "; ".join(uncovered)
    )
  arrays = {path: np.asarray(leaf) for path, leaf in leaves.items()}
  tensors: dict[str, np.ndarray] = {}
  pieces = defaultdict(list)
  for rule in rules:
    array = arrays[rule.path]
    tensor = rule.to_torch(array if rule.index is None else array[rule.index])
    if rule.rows is not None:
      pieces[rule.names[0]].append((rule.rows, tensor))
      continue
    for name, part in zip(rule.names, rule.split(tensor), strict=True):
      tensors[name] = np.ascontiguousarray(part)
  for name, parts in pieces.items():
    ordered = [tensor for _, tensor in sorted(parts, key=lambda part: part[0])]
    tensors[name] = np.ascontiguousarray(np.concatenate(ordered))
  return tensors


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


def _fill(leaf, rules: Sequence[Rule], tensors: Mapping[str, Any], dtype):
  if rules[0].index is None:
    return jnp.asarray(read(rules[0], tensors), dtype)
  stacked = np.empty(leaf.shape, dtype)
  for rule in rules:
    stacked[rule.index] = read(rule, tensors).astype(dtype)
  return jnp.asarray(stacked)


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
