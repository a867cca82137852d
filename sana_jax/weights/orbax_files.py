"""Parameters on disk as Orbax stores them: nested dicts of arrays.

A component is a directory with `config.json` and `params/`; the names of the
arrays are those of our parameters.
"""

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
  with ocp.PyTreeCheckpointer() as checkpointer:
    found = checkpointer.metadata(directory).item_metadata.tree
  return {
    name: files.Tensor(
      tuple(leaf.shape), np.dtype(leaf.dtype), _reader(directory, name)
    )
    for name, leaf in zip(
      tree.leaf_names(found), jax.tree.leaves(found), strict=True
    )
  }


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


def _reader(directory: epath.Path, name: str):
  def read() -> np.ndarray:
    wanted = _nest({name: 0})
    as_numpy = _nest({name: ocp.RestoreArgs(restore_type=np.ndarray)})
    with ocp.PyTreeCheckpointer() as checkpointer:
      nested = checkpointer.restore(
        directory,
        args=ocp.args.PyTreeRestore(
          item=wanted, restore_args=as_numpy, partial_restore=True
        ),
      )
    return np.asarray(jax.tree.leaves(nested)[0])

  return read


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  nested: dict[str, Any] = {}
  for name, value in flat.items():
    *parents, last = name.split("/")
    node = nested
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = value
  return nested
