"""Batches of a host, from step to step: Grain around what is to be read.

The batch of a step is known from the step alone, so the only state of an input
is the number of the next step. The rows of a global batch are spread over the
hosts in order: hosts may come and go between runs.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import grain
import numpy as np

from sana_jax.data import retrying
from sana_jax.data import sampler as sampler_lib

# Rows that one thread reads at a time; a step has several such pieces, so that
# threads share a step and little waits in memory.
_PIECE = 16
# Steps that are ready ahead of time.
_AHEAD = 2
_FOREVER = 2**62

Batch = dict[str, np.ndarray]
ReadFn = Callable[[sampler_lib.BatchPlan], Batch]


class Host(NamedTuple):
  """One of the processes that read a global batch between them.

  Attributes:
    num_threads: that read; with workers, in each; 0: as it is asked for.
    num_workers: processes that read; 0: this one does.
  """

  process: int = 0
  processes: int = 1
  num_threads: int = 4
  num_workers: int = 0


HostBatches = Callable[[Host, int], Iterable[Any]]
"""(host, first step) -> the host's rows of that step's batch and all after."""


def example_batches(dataset: grain.MapDataset, batch_size: int) -> HostBatches:
  """Batches examples in order: step t has those from t * batch_size on."""

  def start(host: Host, first_step: int) -> Iterable[Any]:
    local = dataset.batch(batch_size // host.processes)
    mine = local[host.process :: host.processes]
    return _iterate(mine[first_step:], host, buffer=8)

  return start


def planned_batches(
  plans: sampler_lib.BatchSampler, batch_size: int, read: ReadFn
) -> HostBatches:
  """Reads what a sampler plans.

  Args:
    batch_size: of `plans`.
    read: makes arrays, one row per sample, of a part of a batch. With worker
      processes it is pickled.
  """

  def start(host: Host, first_step: int) -> Iterable[Batch]:
    rows = batch_size // host.processes
    piece = max(n for n in range(1, _PIECE + 1) if rows % n == 0)
    pieces = rows // piece
    dataset = grain.MapDataset.source(
      _Pieces(plans, host.process * rows, piece, pieces)
    ).map(read)
    return _iterate(
      dataset[first_step * pieces :],
      host,
      buffer=max(_AHEAD * pieces, 2 * host.num_threads),
    ).batch(pieces, batch_fn=_join)

  return start


class _Pieces:
  """Item i is piece i % pieces of this host's part of step i // pieces."""

  def __init__(
    self, plans: sampler_lib.BatchSampler, first: int, piece: int, pieces: int
  ):
    self._plans = plans
    self._first, self._piece, self._pieces = first, piece, pieces

  def __len__(self) -> int:
    return _FOREVER

  def __getitem__(self, index: int) -> sampler_lib.BatchPlan:
    step, number = divmod(int(index), self._pieces)
    start = self._first + number * self._piece
    return self._plans.batch(step, (start, start + self._piece))


def read_records(sources, plan: sampler_lib.BatchPlan) -> list[Any]:
  """Returns the records of a plan, those of a source read in one go.

  What the disk or the network does not give is asked for several times.
  """
  found: list[Any] = [None] * len(plan.index)
  for number in np.unique(plan.source):
    rows = np.flatnonzero(plan.source == number)
    indices = [int(index) for index in plan.index[rows]]
    items = retrying.call(
      functools.partial(sources[number].__getitems__, indices)
    )
    for row, item in zip(rows, items, strict=True):
      found[row] = item
  return found


def _iterate(
  dataset: grain.MapDataset, host: Host, *, buffer: int
) -> grain.IterDataset:
  options = grain.ReadOptions(
    num_threads=host.num_threads,
    prefetch_buffer_size=buffer if host.num_threads else 0,
  )
  iterated = dataset.to_iter_dataset(options)
  if host.num_workers:
    iterated = iterated.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=host.num_workers,
        per_worker_buffer_size=-(-buffer // host.num_workers),
      )
    )
  return iterated


def _join(pieces: list[Batch]) -> Batch:
  return {
    name: np.concatenate([piece[name] for piece in pieces])
    for name in pieces[0]
  }
