"""Where the arrays of a run are: state, fixed components, batches."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from sana_jax import config as config_lib
from sana_jax import sharding, tree
from sana_jax.data import loader
from sana_jax.training import optim
from sana_jax.training import step as step_lib

# Leaves of a batch, by name: pictures are cut by rows too.
_BATCH_AXES = (
  (r"(^|/)(latents|images)$", ("batch", "rows")),
  (r"", ("batch",)),
)
_MEANING = {"batch": "samples", "rows": "rows"}
_REMEDY = {
  "batch": "change batch_size or the mesh",
  "rows": "use a smaller sequence axis, or buckets whose heights it divides",
}


def state_shardings(abstract, param_axes, mesh, offload=()):
  """Shards moments and average like their parameters, the rest replicated.

  Optimiser states must be placed explicitly: they start as zeros, which depend
  on no sharded input, so jit alone would put them all on one device.

  Args:
    offload: what is in the host's memory; see `HardwareConfig.offload`.
  """
  params = {
    name: sharding.param_shardings(module, param_axes[name], mesh)
    for name, module in abstract.params.items()
  }
  replicated = sharding.replicated(mesh)
  opt_state = optim.state_shardings(
    abstract.opt_state, abstract.params, params, mesh
  )
  ema = None if abstract.ema is None else params
  if "optimizer" in offload:
    opt_state = jax.tree.map(_on_host, opt_state, abstract.opt_state)
  if "average" in offload and ema is not None:
    ema = jax.tree.map(_on_host, ema, abstract.ema)
  return step_lib.TrainState(replicated, params, ema, opt_state, replicated)


def _on_host(place: jax.sharding.NamedSharding, leaf: Any):
  # A count is no burden, and is looked at by the host's program.
  return place.with_memory_kind("pinned_host") if leaf.ndim else place


def frozen_shardings(frozen, param_axes, mesh):
  """Shards frozen components like trained ones; what has no rows is whole."""
  replicated = sharding.replicated(mesh)
  return {
    name: sharding.param_shardings(arrays, param_axes[name], mesh)
    if name in param_axes
    else jax.tree.map(lambda _: replicated, arrays)
    for name, arrays in frozen.items()
  }


def reader_of_all(config: config_lib.TrainConfig) -> loader.Host:
  """One host that reads whole batches, whatever the mesh gives to whom."""
  return loader.Host(0, 1, config.data.num_threads, 0)


def batch_shardings(batch: Any, mesh: jax.sharding.Mesh) -> Any:
  """Gives every leaf of a batch, whole or abstract, a NamedSharding.

  Raises:
    ValueError: samples, or rows of latents, do not divide over the mesh.
  """

  def place(name: str, leaf: Any) -> jax.sharding.NamedSharding:
    axes = next(axes for row, axes in _BATCH_AXES if re.search(row, name))
    found = sharding.batch_sharding(mesh, axes)
    for axis, n in zip(axes, leaf.shape, strict=False):
      count = math.prod(mesh.shape[a] for a in sharding.RULES[axis])
      if n % count:
        raise ValueError(
          f"{name} of shape {tuple(leaf.shape)} has {n} {_MEANING[axis]}, "
          f"which do not divide over {_product(mesh, axis)}; {_REMEDY[axis]}."
        )
    return found

  return tree.map_with_names(place, batch)


def global_batches(
  batches: loader.HostBatches,
  config: config_lib.TrainConfig,
  mesh: jax.sharding.Mesh,
  *,
  first_step: int,
) -> Iterator[Any]:
  """Yields the batches of step `first_step`, `first_step` + 1, ...

  Every process reads the samples that its devices need, whole; the global batch
  of a step is the same whatever the mesh and the number of processes.

  Raises:
    ValueError: rows of a batch do not divide over the devices.
  """
  places = sharding.batch_sharding(mesh).addressable_devices_indices_map(
    (config.batch_size,)
  )
  starts, length = runs(
    {index[0].indices(config.batch_size)[:2] for index in places.values()},
    config.batch_size,
  )
  # Several hosts in one, where the mesh gives a process several runs of samples
  # that do not follow each other.
  readers = [
    iter(
      batches(
        loader.Host(
          start // length,
          config.batch_size // length,
          config.data.num_threads,
          config.data.num_workers,
        ),
        first_step,
      )
    )
    for start in starts
  ]
  for parts in zip(*readers, strict=True):
    yield _join(dict(zip(starts, parts, strict=True)), config.batch_size, mesh)


def runs(
  blocks: set[tuple[int, int]], batch_size: int
) -> tuple[list[int], int]:
  """Covers blocks (start, stop) of a batch by equal runs, as long as can be.

  Returns the starts of the runs, which are multiples of their length, and that.
  """
  merged: list[list[int]] = []
  for start, stop in sorted(blocks):
    if merged and start == merged[-1][1]:
      merged[-1][1] = stop
    else:
      merged.append([start, stop])
  length = math.gcd(batch_size, *(edge for run in merged for edge in run))
  starts = [n for start, stop in merged for n in range(start, stop, length)]
  return starts, length


def _join(parts: dict[int, Any], batch_size: int, mesh) -> Any:
  """Makes a global batch of the runs of samples that this process has read."""

  def abstract(leaf):
    return jax.ShapeDtypeStruct((batch_size, *leaf.shape[1:]), leaf.dtype)

  whole = jax.tree.map(abstract, next(iter(parts.values())))
  places = batch_shardings(whole, mesh)

  def put(shape, place, *leaves):
    length = len(leaves[0])

    def local(index):
      start, stop, _ = index[0].indices(batch_size)
      rows = [
        leaf[max(start - first, 0) : stop - first][(slice(None), *index[1:])]
        for first, leaf in zip(parts, leaves, strict=True)
        if first < stop and start < first + length
      ]
      return rows[0] if len(rows) == 1 else np.concatenate(rows)

    return jax.make_array_from_callback(shape.shape, place, local)

  return jax.tree.map(put, whole, places, *parts.values())


def _product(mesh: jax.sharding.Mesh, axis: str) -> str:
  return " x ".join(f"{a}={mesh.shape[a]}" for a in sharding.RULES[axis])
