"""What modules may know of the mesh that a step is traced for."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array

from sana_jax.sharding import rules as rules_lib


def use(mesh: Mesh) -> AbstractContextManager:
  """Makes `constrain` mean `mesh`, while what is jitted is traced.

  The mesh is part of what JAX's caches look at, so nothing that was traced for
  another mesh is used again.
  """
  return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain(x: Array, axes: rules_lib.Axes) -> Array:
  """Shards an activation by logical axes; a no-op without a mesh in `use`.

  Raises:
    ValueError: an axis is not divisible by its shards.
  """
  sizes = _sizes()
  if not sizes:
    return x
  named = [rules_lib.mesh_axes(axis) for axis in axes]
  for axis, names, n in zip(axes, named, x.shape, strict=True):
    count = rules_lib.size_of(names, sizes)
    if n % count:
      raise ValueError(
        f"the {axis} axis of {tuple(x.shape)}, {n}, is not divisible by the "
        f"mesh's {_product(names, sizes)}. Sizes that divide it: "
        f"{', '.join(map(str, rules_lib.divisors(n)))}."
      )
  return jax.lax.with_sharding_constraint(
    x, rules_lib.partition_spec(named, sizes)
  )


def shards(axis: str) -> int:
  """Counts the shards of a logical axis; 1 without a mesh in `use`."""
  return rules_lib.size_of(rules_lib.mesh_axes(axis), _sizes())


def spec(axes: rules_lib.Axes, shape: tuple[int, ...]) -> PartitionSpec:
  """Returns how the mesh in `use` shards an activation by logical axes.

  An axis that is not divisible by its shards is whole on all of them.
  """
  sizes = _sizes()
  named = [rules_lib.mesh_axes(axis) for axis in axes]
  kept = [
    () if n % rules_lib.size_of(names, sizes) else names
    for names, n in zip(named, shape, strict=True)
  ]
  return rules_lib.partition_spec(kept, sizes)


def compiler_axes() -> frozenset[str]:
  """Names the axes of the mesh in `use` that the compiler partitions.

  What it cannot partition, such as a kernel, runs in a `shard_map` over them.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return frozenset(
    name
    for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
    if kind == AxisType.Auto
  )


def platform() -> str | None:
  """Names what the devices of the mesh in use are; None: there is none."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return None if device is None else device.platform


def _sizes() -> Mapping[str, int]:
  """Sizes of the axes that the compiler partitions.

  None inside a `shard_map`, such as a pipeline's: the arrays are local there.
  """
  mesh = jax.sharding.get_abstract_mesh()
  return {
    name: size
    for name, size, kind in zip(
      mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True
    )
    if kind == AxisType.Auto and size > 1
  }


def _product(names: tuple[str, ...], sizes: Mapping[str, int]) -> str:
  return " x ".join(f"{n}={sizes[n]}" for n in names if n in sizes)
