"""The one table from logical axes to mesh axes."""

import math
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

Axes = tuple[str | None, ...]
Rules = Mapping[str, tuple[str, ...]]

RULES: Rules = {
  # Of activations: samples, and the rows of a picture's latents.
  "batch": ("data", "fsdp"),
  "rows": ("sequence",),
  # Of parameters: the model's width, and what is expanded from it.
  "embed": ("fsdp",),
  "heads": ("tensor",),
  "mlp": ("tensor",),
  # The width of a kernel whose output has several parts side by side, such as
  # queries, keys and values. Cut into consecutive runs, that output would mix
  # parts, so at rest the kernel is cut along its input; `layers.Linear.split`
  # moves it (a weight, not activations) to a share of every part.
  "fused_embed": ("fsdp", "tensor"),
  "fused": (),
  "vocab": (),
  "layers": (),
}
REPLICATED_RULES: Rules = dict.fromkeys(RULES, ())


def mesh_axes(axis: str | None, rules: Rules = RULES) -> tuple[str, ...]:
  """Returns the mesh axes of a logical axis.

  Raises:
    ValueError: there is no rule for it.
  """
  if axis is None:
    return ()
  if axis not in rules:
    raise ValueError(
      f"No sharding rule for logical axis {axis!r}; rules: {sorted(rules)}."
    )
  return rules[axis]


def partition_spec(
  axes: Sequence[tuple[str, ...]], sizes: Mapping[str, int]
) -> PartitionSpec:
  """Writes mesh axes of every dimension; those of size one are left out."""
  kept = [
    tuple(name for name in names if sizes.get(name, 1) > 1) for names in axes
  ]
  while kept and not kept[-1]:  # XLA drops trailing None: so do we.
    kept.pop()
  return PartitionSpec(
    *(names[0] if len(names) == 1 else names or None for names in kept)
  )


def size_of(names: Sequence[str], sizes: Mapping[str, int]) -> int:
  """Counts the shards that the mesh axes `names` make."""
  return math.prod(sizes.get(name, 1) for name in names)


def divisors(n: int) -> list[int]:
  """Lists the numbers of shards that an axis of `n` can be cut in."""
  return [size for size in range(1, n + 1) if n % size == 0]


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of an array that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axes: Axes = ("batch",)) -> NamedSharding:
  """The sharding of a leaf of a batch, whose first axis is the samples."""
  spec = partition_spec([mesh_axes(axis) for axis in axes], mesh.shape)
  return NamedSharding(mesh, spec)
