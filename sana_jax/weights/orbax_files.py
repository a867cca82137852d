"""Parameters on disk as Orbax stores them: nested dicts of arrays.

A component is a directory with `config.json` and `params/`; the names of the
arrays are those of our parameters.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from sana_jax import tree
from sana_jax.weights import files

_PARAMS = "params"
_METADATA = "_METADATA"
_GROUP_BYTES = 256 * 10**6


def holds_params(directory: epath.PathLike) -> bool:
  """Whether a directory is a component that `write_component` wrote."""
  return (epath.Path(directory) / _PARAMS / _METADATA).is_file()


def open_params(directory: epath.PathLike) -> files.Tensors:
  """Lists the parameters of a component; each is read when asked for."""
  return open_tree(epath.Path(directory) / _PARAMS)


def open_tree(directory: epath.PathLike) -> files.Tensors:
  """Lists all arrays of one Orbax item, such as `checkpoints/100/state`.

  Raises:
    FileNotFoundError: there is no complete item.
  """
  directory = epath.Path(directory).absolute()
  if not (directory / _METADATA).is_file():
    raise FileNotFoundError(
      f"{directory} is no complete Orbax checkpoint: it has no {_METADATA}."
    )
  # Of the handler, not of a checkpointer, which warns of items in a directory
  # of several.
  found = ocp.PyTreeCheckpointHandler().metadata(directory).tree
  leaves = dict(
    zip(tree.leaf_names(found), jax.tree.leaves(found), strict=True)
  )
  sizes = {
    name: math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    for name, leaf in leaves.items()
  }
  tensors = {}
  for group in _groups(sizes):
    reader = _GroupReader(directory, group)
    for name in group:
      leaf = leaves[name]
      tensors[name] = files.Tensor(
        tuple(leaf.shape),
        np.dtype(leaf.dtype),
        functools.partial(reader.read, name),
      )
  return tensors


def write_component(
  directory: epath.PathLike,
  config: Mapping[str, Any],
  tensors: Mapping[str, Any],
) -> None:
  """Writes config.json and the parameters; one copy of them is in memory.

  Args:
    tensors: by the names of our parameters, as arrays or `files.Tensor`.
  """
  directory = epath.Path(directory).absolute()
  directory.mkdir(parents=True, exist_ok=True)
  files.write_json(directory / "config.json", config)
  nested = _nest({name: np.asarray(value) for name, value in tensors.items()})
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(directory / _PARAMS, nested)


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
  """Cuts the names into runs of a few arrays; a large one is alone."""
  groups: list[list[str]] = [[]]
  total = 0
  for name, size in sizes.items():
    if groups[-1] and total + size > _GROUP_BYTES:
      groups.append([])
      total = 0
    groups[-1].append(name)
    total += size
  return groups


class _GroupReader:
  """Restores a group at once, and hands each of its arrays out once.

  A restore takes as long for many small arrays as for one.
  """

  def __init__(self, directory: epath.Path, names: list[str]):
    self._directory = directory
    self._names = names
    self._arrays: dict[str, np.ndarray] = {}

  def read(self, name: str) -> np.ndarray:
    if name not in self._arrays:
      self._arrays = self._restore()
    return self._arrays.pop(name)

  def _restore(self) -> dict[str, np.ndarray]:
    wanted = _nest(dict.fromkeys(self._names, 0))
    as_numpy = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
      nested = checkpointer.restore(
        self._directory,
        args=ocp.args.PyTreeRestore(
          item=wanted, restore_args=as_numpy, partial_restore=True
        ),
      )
    return dict(
      zip(tree.leaf_names(nested), jax.tree.leaves(nested), strict=True)
    )


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  nested: dict[str, Any] = {}
  for name, value in flat.items():
    *parents, last = name.split("/")
    node = nested
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return nested
