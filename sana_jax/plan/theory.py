"""What a step would send at least, from its parameters' shardings alone.

Fully sharded data parallelism gathers every parameter before its use, forward
and backward, and scatters the sum of its gradients; what is replicated is
summed over the replicas. All that in the compute type. Tensor and sequence
parallelism send activations besides, which is not counted here.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from sana_jax.plan import collectives

Bytes = dict[tuple[tuple[str, ...], str], float]

# Axes whose devices see different samples, or different tokens of them.
_DATA_LIKE = ("data", "fsdp", "sequence")


def least_bytes(
  params: Any, mesh: Mapping[str, int], dtype: Any, parts: int = 1
) -> Bytes:
  """Returns the bytes a device sends, by (mesh axes, kind).

  Args:
    params: leaves have shapes and shardings.
    mesh: the size of every axis.
    dtype: of gathered parameters and of gradients.
    parts: that a batch is taken in: each gathers, and scatters.
  """
  sums: Bytes = {}
  width = np.dtype(dtype).itemsize
  for leaf in jax.tree.leaves(params):
    cut = _cut_axes(leaf, mesh)
    local = width * math.prod(leaf.sharding.shard_shape(leaf.shape))
    sharded = tuple(a for a in mesh if a in cut and a in _DATA_LIKE)
    count = math.prod(mesh[axis] for axis in sharded)
    if count > 1:
      sent = local * (count - 1)  # (n - 1) / n of n shards
      _add(sums, sharded, "all-gather", 2 * parts * sent)
      _add(sums, sharded, "reduce-scatter", parts * sent)
    copies = tuple(
      a for a in mesh if a not in cut and a in _DATA_LIKE and mesh[a] > 1
    )
    count = math.prod(mesh[axis] for axis in copies)
    if count > 1:
      _add(sums, copies, "all-reduce", 2 * local * (count - 1) / count)
  return sums


def gathered_activations(
  found: Iterable[collectives.Collective],
  params: Any,
  mesh: Mapping[str, int],
  *,
  image_elements: int,
) -> list[collectives.Collective]:
  """Returns what is gathered or exchanged and has no parameter's size.

  Args:
    image_elements: of the residual stream of one image on a device; what is
      smaller, such as time embeddings, is left out.
  """
  fsdp, tensor = mesh.get("fsdp", 1), mesh.get("tensor", 1)
  # Of what is gathered in two steps, the first makes a part.
  parts = [n for n in range(1, fsdp) if fsdp % n == 0] or [1]
  sizes = set()
  for leaf in jax.tree.leaves(params):
    depth = leaf.shape[0] if leaf.ndim else 1
    for cut in (n * m for n in parts for m in (1, tensor)):
      # Blocks are stacked: one at a time is gathered.
      sizes |= {leaf.size // cut, leaf.size // depth // cut}
  return [
    one
    for one in found
    if one.kind in ("all-gather", "all-to-all")
    and any(
      array.elements not in sizes and array.elements >= image_elements
      for array in one.arrays
    )
  ]


def _cut_axes(leaf: Any, mesh: Mapping[str, int]) -> set[str]:
  names: set[str] = set()
  for entry in leaf.sharding.spec:
    names |= {entry} if isinstance(entry, str) else set(entry or ())
  return {name for name in names if mesh[name] > 1}


def _add(sums: Bytes, axes: tuple[str, ...], kind: str, sent: float) -> None:
  sums[axes, kind] = sums.get((axes, kind), 0.0) + sent
