"""From one layout of a component's tensors to another, a tensor at a time.

Both layouts have a table of `mapping.Rule`; a tensor of one is computed from
the tensors of the other through the parameter they share, when it is read.
"""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sana_jax.weights import files, mapping


def translate(
  abstract_model: Any,
  tensors: Mapping[str, Any],
  source: Sequence[mapping.Rule],
  target: Sequence[mapping.Rule],
  *,
  ignore: Iterable[str] = (),
  dtype: Any = None,
  source_name: str = "checkpoint",
) -> dict[str, files.Tensor]:
  """Returns the tensors of the target layout, in an order good for reading.

  Values are read and computed when asked for; what is kept is the parameter
  that was read last. They are exact unless `dtype` changes them.

  Args:
    abstract_model: from `jax.eval_shape`; both tables must cover it.
    tensors: of the source layout.
    ignore: see `mapping.load`.
    dtype: None keeps each tensor's own.

  Raises:
    ValueError: the tensors do not fit, all problems are listed; or one target
      tensor would come from tensors of several dtypes. Reading a tensor
      raises it for a value too large for `dtype`.
  """
  problems = mapping.problems(abstract_model, source, tensors, ignore=ignore)
  if problems:
    raise ValueError(
      f"{source_name} does not fit the model its config describes:\n  "
      + "\n  ".join(problems)
    )
  parameters = _Parameters(source, tensors)
  shapes = mapping.expected_shapes(abstract_model, target)
  pieces = defaultdict(list)
  for rule in sorted(target, key=lambda rule: parameters.order[rule.path]):
    for position, name in enumerate(rule.names):
      pieces[name].append((rule, position))
  return {
    name: files.Tensor(
      tuple(shapes[name]),
      np.dtype(dtype or parameters.dtype(parts[0][0])),
      functools.partial(_compute, parameters, parts, dtype),
    )
    for name, parts in pieces.items()
  }


def _compute(
  parameters: "_Parameters", parts: Sequence[tuple[mapping.Rule, int]], dtype
) -> np.ndarray:
  def part(rule: mapping.Rule, position: int) -> np.ndarray:
    tensor = rule.to_torch(parameters.read(rule.path, rule.index))
    return rule.split(tensor)[position]

  # Several parameters may be the rows of one tensor.
  ordered = sorted(parts, key=lambda pair: pair[0].rows or (0, 0))
  arrays = [part(*pair) for pair in ordered]
  array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
  return np.ascontiguousarray(_cast(array, dtype))


def _cast(array: np.ndarray, dtype: Any) -> np.ndarray:
  if dtype is None:
    return array
  with np.errstate(over="ignore"):
    cast = array.astype(dtype)
  largest = np.abs(array.astype(np.float64)).max(initial=0)
  if np.isfinite(largest) and not np.isfinite(np.abs(cast).max(initial=0)):
    raise ValueError(
      f"{np.dtype(dtype)} cannot hold a value of {largest:.3g}; convert to "
      "bfloat16 or float32."
    )
  return cast


class _Parameters:
  """Reads parameters, or single blocks' shares, through the source's table."""

  def __init__(self, rules: Sequence[mapping.Rule], tensors):
    self._tensors = tensors
    self._rules: dict[str, dict[int | None, mapping.Rule]] = defaultdict(dict)
    for rule in rules:
      self._rules[rule.path][rule.index] = rule
    self.order = {path: i for i, path in enumerate(self._rules)}
    self._last: tuple[Any, np.ndarray | None] = (None, None)

  def dtype(self, rule: mapping.Rule) -> np.dtype:
    shares = self._rules[rule.path]
    chosen = (
      [shares[rule.index]] if rule.index in shares else list(shares.values())
    )
    dtypes = {
      np.dtype(self._tensors[name].dtype)
      for share in chosen
      for name in share.names
    }
    if len(dtypes) > 1:
      raise ValueError(
        f"{rule.path} comes from tensors of the dtypes "
        f"{sorted(map(str, dtypes))}; choose one dtype for all."
      )
    return dtypes.pop()

  def read(self, path: str, index: int | None) -> np.ndarray:
    shares = self._rules[path]
    if index in shares:
      return self._share(path, index)
    if index is not None:
      return self._share(path, None)[index]
    # Filled block by block: only one block is in memory twice.
    first = self._share(path, 0)
    stacked = np.empty((len(shares), *first.shape), first.dtype)
    for i in range(len(shares)):
      stacked[i] = self._share(path, i)
    return stacked

  def _share(self, path: str, index: int | None) -> np.ndarray:
    if self._last[0] != (path, index):
      self._last = (None, None)  # Freed before the next is read.
      value = mapping.read(self._rules[path][index], self._tensors)
      self._last = ((path, index), value)
    return self._last[1]
