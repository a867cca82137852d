"""Where the state of an optimiser is: beside its parameter."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sana_jax import tree


def state_shardings(
  opt_state: Any, params: Any, param_shardings: Any, mesh: Mesh
) -> Any:
  """Shards every leaf of an optimiser's state like its parameter.

  A leaf belongs to the parameter whose name is a key on the way to it. What has
  the parameter's shape has its sharding; a mean over an axis has that of the
  other axes; of an axis of another length (blocks), the mesh axis is kept where
  it divides that. What belongs to no parameter, such as a count, is replicated.

  Args:
    opt_state: abstract state of `optim.make_optimizer(...)`.
    params: abstract parameters.
    param_shardings: a NamedSharding for each of them.
  """
  of_params = {
    name: (leaf.shape, place.spec)
    for name, leaf, place in zip(
      tree.leaf_names(params),
      jax.tree.leaves(params),
      jax.tree.leaves(param_shardings),
      strict=True,
    )
  }

  def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    keys = [k.key for k in path if isinstance(k, jax.tree_util.DictKey)]
    name = next((key for key in keys if key in of_params), None)
    if name is None:
      return NamedSharding(mesh, PartitionSpec())
    fields = [k.name for k in path if isinstance(k, jax.tree_util.GetAttrKey)]
    entries = _entries(fields[-1], leaf.shape, *of_params[name], mesh)
    while entries and entries[-1] is None:  # XLA drops trailing None.
      entries.pop()
    return NamedSharding(mesh, PartitionSpec(*entries))

  return jax.tree_util.tree_map_with_path(place, opt_state)


def _entries(
  field: str,
  shape: tuple[int, ...],
  of_param: tuple[int, ...],
  spec: PartitionSpec,
  mesh: Mesh,
) -> list[Any]:
  entries = [*spec, *[None] * (len(of_param) - len(spec))]
  if len(shape) == len(of_param) - 1:
    # Of a square matrix, the shape does not tell which mean it is.
    order = (-2, -1) if "col" in field else (-1, -2)
    for axis in order:
      kept = [i for i in range(len(of_param)) if i != len(of_param) + axis]
      if tuple(of_param[i] for i in kept) == shape:
        return [entries[i] for i in kept]
  if len(shape) != len(of_param):
    return []
  return [
    entry if n == old or n % _size(mesh, entry) == 0 else None
    for entry, n, old in zip(entries, shape, of_param, strict=True)
  ]


def _size(mesh: Mesh, entry: Any) -> int:
  names = (entry,) if isinstance(entry, str) else (entry or ())
  size = 1
  for name in names:
    size *= mesh.shape[name]
  return size
