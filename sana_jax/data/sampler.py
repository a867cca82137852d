"""Which records a step trains on: a pure function of (seed, step).

All samples of a step share a bucket (a shape), so all devices run one program.
A bucket's records form an endless stream: one pass in a new random order after
the other. Batch j of a bucket is stream[j B : (j + 1) B]; nothing is dropped,
for what a pass leaves over begins the next batch. In that batch no record comes
twice: those that would change places with earlier ones of the pass that ends.
A bucket of B to 2 B records may not have enough of those; it keeps an order for
as many passes as fill whole batches. (A bucket of fewer than B records repeats
them in every batch, and so may a source that its weight takes through another
number of passes than one in an epoch.) Epoch e holds the batches that its
passes complete, those of all buckets in random order.

With n_k records in bucket k, that is floor((e + 1) n_k / B) - floor(e n_k / B)
batches. Counts are closed forms and orders are computed element by element
(`permutation.py`), so any step is as cheap as the next one.
"""

import bisect
import dataclasses
import fractions
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from sana_jax.data import permutation

# Tell apart what is drawn from one seed.
_ORDER, _MIXTURE, _RECORDS, _DRAWS = range(4)


@dataclasses.dataclass(frozen=True)
class Population:
  """The records of a source that are trained on.

  Attributes:
    name: of the source, for messages.
    weight: share of its samples, relative to the other sources.
    members: for every bucket, the numbers of its records in the source.
  """

  name: str
  weight: float
  members: tuple[Int64[np.ndarray, "_"], ...]

  def __len__(self) -> int:
    return sum(len(records) for records in self.members)


class BatchPlan(NamedTuple):
  """The samples of one step.

  Attributes:
    bucket: the one that all samples are in.
    source: for every sample, the number of its source.
    index: the number of its record in that source.
    draw: a seed for what is random about it (caption, crop, flip), new every
      time that a record comes.
  """

  bucket: int
  source: Int64[np.ndarray, "b"]
  index: Int64[np.ndarray, "b"]
  draw: UInt64[np.ndarray, "b"]


class EpochCounts(NamedTuple):
  """What an epoch consists of.

  Attributes:
    first_step: its first; where that is also `end_step`, it has none.
    end_step: the one after its last.
    drawn: samples that every source gives.
    carried: samples that wait for the next epoch, at the end of this one.
  """

  first_step: int
  end_step: int
  drawn: tuple[int, ...]
  carried: int


class BatchSampler:
  """Plans batches; see the module.

  An epoch is as many samples as there are records. Of these, source s gives
  its share by weight, spread over its buckets as its records are; fractions
  carry over, so shares are exact in the long run. A source of more than its
  proportional weight is passed through more than once per epoch.

  With other weights, another epoch and other records belong to a step; still
  every source is passed through in the orders it had, from another place on.

  Args:
    populations: one per source, all over the same buckets.
    batch_size: samples of a step, on all devices of all hosts together.

  Attributes:
    batch_size: likewise.
  """

  def __init__(
    self, populations: Sequence[Population], batch_size: int, seed: int
  ):
    _check(populations, batch_size)
    self._members = [population.members for population in populations]
    self.batch_size = batch_size
    self._seed = seed
    self._size = sum(len(population) for population in populations)
    self._num_buckets = len(populations[0].members)
    self._rates, self._scale = _rates(populations)
    self._turns = [
      self._passes_of_an_order(b) for b in range(self._num_buckets)
    ]
    # By bucket, of the epoch that was asked for last.
    self._swaps: dict[int, tuple[int, int, Any]] = {}

  def batches_per_epoch(self) -> tuple[fractions.Fraction, ...]:
    """Returns for every bucket how many batches an epoch has on average."""
    whole = self._scale * self.batch_size
    return tuple(
      fractions.Fraction(sum(rates[bucket] for rates in self._rates), whole)
      for bucket in range(self._num_buckets)
    )

  def counts(self, epoch: int) -> EpochCounts:
    """Returns what an epoch consists of, without planning it."""
    return EpochCounts(
      self._batches_before(epoch),
      self._batches_before(epoch + 1),
      tuple(
        sum(
          self._taken(source, bucket, epoch + 1)
          - self._taken(source, bucket, epoch)
          for bucket in range(self._num_buckets)
        )
        for source in range(len(self._members))
      ),
      sum(
        self._filled(bucket, epoch + 1) % self.batch_size
        for bucket in range(self._num_buckets)
      ),
    )

  def epoch(self, step: int) -> int:
    """Returns the epoch of a step.

    Raises:
      ValueError: the step is negative.
    """
    if step < 0:
      raise ValueError(f"step must not be negative, got {step}.")
    # Before epoch e there are at most e n / B batches, and at least that less
    # what every source and the last batch of every bucket carry over.
    samples = step * self.batch_size
    carried = self._num_buckets * (self.batch_size + len(self._members))
    first = samples // self._size
    last = (samples + self.batch_size + carried) // self._size + 1
    candidates = range(first, last + 1)
    return first - 1 + bisect.bisect(candidates, step, key=self._batches_before)

  def batch(self, step: int, rows: tuple[int, int] | None = None) -> BatchPlan:
    """Returns the batch of a step.

    Args:
      rows: only those from the first to before the second; what is left out is
        not computed.

    Raises:
      ValueError: the step is negative.
    """
    first, last = rows or (0, self.batch_size)
    epoch = self.epoch(step)
    bucket, number = self._batch_of_bucket(step, epoch)
    start = number * self.batch_size
    source, index = self._read_stream(bucket, start + first, start + last)
    draw = permutation.fold(
      self._seed, _DRAWS, step, np.arange(first, last, dtype=np.uint64)
    )
    return BatchPlan(bucket, source, index, draw)

  def _passes_of_an_order(self, bucket: int) -> int:
    """Returns after how many passes a bucket's records have a new order.

    With one order, any B of n >= B records that follow each other differ, the
    end of a pass and the beginning of the next one too; and orders change where
    a batch ends. That is for buckets that may have an epoch without a batch of
    its own, so that `_swapped` has nothing to swap with.
    """
    sizes = [len(members[bucket]) for members in self._members]
    size, common = sum(sizes), math.gcd(sum(sizes), self.batch_size)
    whole = all(
      rates[bucket] == count * self._scale
      for rates, count in zip(self._rates, sizes, strict=True)
    )
    if whole and self.batch_size < size < 2 * self.batch_size - common:
      return self.batch_size // common
    return 1

  def _taken(self, source: int, bucket: int, epoch: int) -> int:
    """Counts what the epochs before `epoch` take of a source's bucket."""
    return epoch * self._rates[source][bucket] // self._scale

  def _filled(self, bucket: int, epoch: int) -> int:
    """Counts the samples of a bucket in the epochs before `epoch`."""
    return sum(
      self._taken(source, bucket, epoch) for source in range(len(self._members))
    )

  def _batches_before(self, epoch: int) -> int:
    return sum(
      self._filled(bucket, epoch) // self.batch_size
      for bucket in range(self._num_buckets)
    )

  def _batch_of_bucket(self, step: int, epoch: int) -> tuple[int, int]:
    """Returns the bucket of a step, and which of its batches it is."""
    starts, stops = (
      [
        self._filled(bucket, e) // self.batch_size
        for bucket in range(self._num_buckets)
      ]
      for e in (epoch, epoch + 1)
    )
    place = np.array([step - sum(starts)], np.uint64)
    key = permutation.fold(self._seed, _ORDER, epoch)
    number = int(permutation.permute(place, sum(stops) - sum(starts), key)[0])
    counts = [b - a for a, b in zip(starts, stops, strict=True)]
    ends = list(itertools.accumulate(counts))
    bucket = bisect.bisect(ends, number)
    return bucket, stops[bucket] - (ends[bucket] - number)

  def _read_stream(self, bucket: int, start: int, stop: int):
    """Returns sources and records at positions of a bucket's stream."""
    # The epochs that hold positions `start` to `stop`, which may be many when
    # the bucket has less records than a batch.
    size = sum(rates[bucket] for rates in self._rates)
    epoch = start * self._scale // size
    sources, indices = [], []
    while start < stop:
      first, end = (self._filled(bucket, e) for e in (epoch, epoch + 1))
      if start < end:
        places = np.arange(
          start - first, min(stop, end) - first, dtype=np.int64
        )
        places = self._apart(bucket, epoch, places)
        source, index = self._read_epoch(bucket, epoch, places)
        sources.append(source)
        indices.append(index)
        start = min(stop, end)
      epoch += 1
    return np.concatenate(sources), np.concatenate(indices)

  def _apart(
    self, bucket: int, epoch: int, places: Int64[np.ndarray, "n"]
  ) -> Int64[np.ndarray, "n"]:
    """Swaps places of an epoch, so that no record comes twice in a batch."""
    size = self._filled(bucket, epoch + 1) - self._filled(bucket, epoch)
    if size < self.batch_size or places[-1] < size - 2 * self.batch_size:
      return places
    # The parts of a step, which threads read, ask for the same.
    known, low, swapped = self._swaps.get(bucket, (None, 0, None))
    if known != epoch:
      low, swapped = self._swapped(bucket, epoch)
      self._swaps[bucket] = epoch, low, swapped
    return np.where(
      places < low, places, low + swapped[np.maximum(places - low, 0)]
    )

  def _swapped(
    self, bucket: int, epoch: int
  ) -> tuple[int, Int64[np.ndarray, "_"]]:
    """Returns a place of an epoch, and what stands for those from there on.

    The batch in which the epoch ends has its last `tail` samples and the first
    `head` of the next one. The latter stay, and those of the former that are
    among them go where the latest others are, but not to the batch that the
    epoch began with.
    """
    first, end, then = (
      self._filled(bucket, e) for e in range(epoch, epoch + 3)
    )
    size, batch = end - first, self.batch_size
    tail = end % batch
    begun, head = -first % batch, batch - tail
    low = max(begun, size - tail - batch)
    swapped = np.arange(size - low)
    if not tail or then - end < head:
      return low, swapped
    taken = self._names(bucket, epoch + 1, np.arange(head))
    own = np.arange(low, size)
    free = ~np.isin(self._names(bucket, epoch, own), taken)
    late = own >= size - tail
    clashing, others = own[late & ~free], own[~late & free][::-1]
    count = min(len(clashing), len(others))
    swapped[clashing[:count] - low] = others[:count] - low
    swapped[others[:count] - low] = clashing[:count] - low
    return low, swapped

  def _names(
    self, bucket: int, epoch: int, places: Int64[np.ndarray, "n"]
  ) -> Int64[np.ndarray, "n"]:
    """Returns one number for source and record together."""
    source, index = self._read_epoch(bucket, epoch, places)
    return index * len(self._members) + source

  def _read_epoch(
    self, bucket: int, epoch: int, places: Int64[np.ndarray, "n"]
  ) -> tuple[Int64[np.ndarray, "n"], Int64[np.ndarray, "n"]]:
    """Returns what stands at `places` of a bucket's samples of an epoch."""
    size = self._filled(bucket, epoch + 1) - self._filled(bucket, epoch)
    order = epoch // self._turns[bucket]
    key = permutation.fold(self._seed, _MIXTURE, bucket, order)
    places = permutation.permute(places.astype(np.uint64), size, key)
    places = places.astype(np.int64)
    starts = [self._taken(s, bucket, epoch) for s in range(len(self._members))]
    ends = np.cumsum(
      [
        self._taken(s, bucket, epoch + 1) - start
        for s, start in enumerate(starts)
      ]
    )
    source = np.searchsorted(ends, places, side="right")
    index = np.empty_like(places)
    for s in np.unique(source):
      here = source == s
      before = ends[s - 1] if s else 0
      index[here] = self._records(
        int(s), bucket, starts[s] + places[here] - before
      )
    return source, index

  def _records(
    self, source: int, bucket: int, places: Int64[np.ndarray, "n"]
  ) -> Int64[np.ndarray, "n"]:
    """Returns the records at positions of the stream of a source's bucket."""
    members = self._members[source][bucket]
    passes, within = np.divmod(places, len(members))
    orders = passes // self._turns[bucket]
    keys = permutation.fold(self._seed, _RECORDS, source, bucket, orders)
    shuffled = permutation.permute(within.astype(np.uint64), len(members), keys)
    return members[shuffled.astype(np.int64)].astype(np.int64)


def _rates(
  populations: Sequence[Population],
) -> tuple[list[list[int]], int]:
  """Returns samples per epoch, by source and bucket, over one denominator."""
  # The decimal number that was written: 0.1 is a tenth.
  weights = [fractions.Fraction(repr(float(p.weight))) for p in populations]
  size = sum(len(population) for population in populations)
  rates = [
    [
      weight / sum(weights) * size * len(members) / len(population)
      for members in population.members
    ]
    for weight, population in zip(weights, populations, strict=True)
  ]
  scale = math.lcm(*(rate.denominator for row in rates for rate in row))
  return [[int(rate * scale) for rate in row] for row in rates], scale


def _check(populations: Sequence[Population], batch_size: int) -> None:
  problems = []
  if batch_size < 1:
    problems.append(f"batch_size must be positive, got {batch_size}")
  if not populations:
    problems.append("there must be at least one source")
  for population in populations:
    if not (population.weight > 0 and math.isfinite(population.weight)):
      problems.append(
        f"the weight of {population.name} must be a positive number, got "
        f"{population.weight}"
      )
    if not len(population):
      problems.append(f"{population.name} has no usable record")
  if len({len(population.members) for population in populations}) > 1:
    problems.append(
      "all sources must have the same buckets, got "
      f"{[len(population.members) for population in populations]}"
    )
  if problems:
    raise ValueError(f"{'; '.join(problems)}.")
