"""Which shape a picture is trained at, and what became of every record."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Int64

from sana_jax import resolution
from sana_jax.data import sampler

Shape = tuple[int, int]

# Reasons that a report's text has, and keys of each; messages may differ from
# file to file.
_SHOWN = 5
_KEYS_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a source's pictures.

  Attributes:
    name: of the source.
    height: in pixels; of a record with a problem, anything.
    width: likewise.
    problems: why a record cannot be used, by its number.
    key: from the number of a record to what it is called, for reports.
  """

  name: str
  height: Int[np.ndarray, "n"]
  width: Int[np.ndarray, "n"]
  problems: Mapping[int, str]
  key: Callable[[int], str] = "record {}".format


@dataclasses.dataclass(frozen=True)
class EpochReport:
  """What one pass through a source reads, and what it does not.

  Attributes:
    source: its name.
    read: records of the source.
    used: those that are trained on.
    left_out: the keys of those that are not, by reason.
    moved: how many are trained at another shape than the best of the table,
      because only the fullest buckets are kept.
  """

  source: str
  read: int
  used: int
  left_out: Mapping[str, Sequence[str]]
  moved: int

  @property
  def skipped(self) -> dict[str, int]:
    """Counts what is left out, by reason."""
    return {reason: len(keys) for reason, keys in self.left_out.items()}

  def __str__(self) -> str:
    text = f"{self.source}: {self.read} records, {self.used} used"
    common = sorted(self.left_out.items(), key=lambda i: (-len(i[1]), i[0]))
    for reason, keys in common[:_SHOWN]:
      named = ", ".join(keys[:_KEYS_SHOWN])
      named += ", ..." if len(keys) > _KEYS_SHOWN else ""
      text += f", {len(keys)} skipped ({reason.rstrip('.')}: {named})"
    if rest := common[_SHOWN:]:
      count = sum(len(keys) for _, keys in rest)
      text += f", {count} skipped for {len(rest)} other reasons"
    if self.moved:
      text += f", {self.moved} moved to a kept shape"
    return text

  def with_skipped(self, reasons: Mapping[str, str]) -> "EpochReport":
    """Adds records that an earlier stage left out: by key, why."""
    left_out = {reason: [*keys] for reason, keys in self.left_out.items()}
    for key, reason in reasons.items():
      left_out.setdefault(reason, []).append(key)
    return dataclasses.replace(
      self, read=self.read + len(reasons), left_out=left_out
    )

  def to_json(self) -> dict[str, Any]:
    """Returns everything, the keys of all that is left out too."""
    return {
      "source": self.source,
      "read": self.read,
      "used": self.used,
      "skipped": sum(self.skipped.values()),
      "skipped_by_reason": {why: [*k] for why, k in self.left_out.items()},
      "moved": self.moved,
    }


@dataclasses.dataclass(frozen=True)
class Bucketing:
  """The records of all sources, sorted into shapes.

  Attributes:
    shapes: (height, width) in pixels of every bucket, the fullest first.
    populations: one per source.
    reports: one per source.
  """

  shapes: tuple[Shape, ...]
  populations: tuple[sampler.Population, ...]
  reports: tuple[EpochReport, ...]


def table(kind: str, image_size: int, multiple: int) -> dict[float, Shape]:
  """Maps height / width to the shapes that pictures may be trained at.

  Args:
    kind: "square", or "aspect": the bins that checkpoints of this size were
      trained at, or for another size their ratios with about the area of the
      square.
    image_size: side of the square, in pixels.
    multiple: what heights and widths are multiples of.

  Raises:
    ValueError: another kind, or a size that is no multiple.
  """
  if image_size % multiple:
    raise ValueError(
      f"data.image_size must be a multiple of {multiple}, the pixels per "
      f"token, got {image_size}."
    )
  if kind == "square":
    return {1.0: (image_size, image_size)}
  if kind != "aspect":
    raise ValueError(f"data.buckets must be 'square' or 'aspect', got {kind!r}")
  grid, rest = divmod(image_size, resolution.COMPRESSION)
  if not rest and grid in resolution.SAMPLE_SIZES:
    published = resolution.bins(grid, training=True)
    if all(side % multiple == 0 for s in published.values() for side in s):
      return dict(published)
  ratios = resolution.bins(max(resolution.SAMPLE_SIZES))
  shapes: dict[Shape, float] = {}
  for ratio in ratios:
    shapes.setdefault(resolution.same_area(ratio, image_size, multiple), ratio)
  return {height / width: (height, width) for height, width in shapes}


def sort(
  sources: Sequence[Sizes],
  weights: Sequence[float],
  shapes: Mapping[float, Shape],
  max_buckets: int,
  *,
  least: int = 1,
) -> Bucketing:
  """Sorts records by the shape whose ratio is nearest to theirs.

  Only the `max_buckets` fullest shapes are kept, for each is compiled; other
  records go to the nearest of those, and lose more by cropping. Then, as long
  as there is a shape of fewer than `least` records, the emptiest is given up.

  Args:
    weights: of the sources in training; the shapes do not depend on them.
    shapes: see `table`.
    least: records of a shape, unless it is the only one. With a batch's worth,
      no picture fills a batch by itself.

  Raises:
    ValueError: a source has no usable record.
  """
  ratios, values = np.array(list(shapes)), list(shapes.values())
  usable = [_usable(sizes) for sizes in sources]
  own = [
    sizes.height[records] / sizes.width[records]
    for sizes, records in zip(sources, usable, strict=True)
  ]
  best = [_nearest(ratio, ratios) for ratio in own]
  kept = _kept(np.concatenate(own), ratios, max_buckets, least)
  final = [kept[_nearest(r, ratios[kept])] if r.size else _NONE for r in own]
  return _bucketing(
    sources,
    weights,
    {int(bucket): values[bucket] for bucket in kept},
    list(zip(usable, best, final, strict=True)),
  )


def _kept(
  own: Float[np.ndarray, "n"],
  ratios: Float[np.ndarray, "k"],
  most: int,
  least: int,
) -> Int64[np.ndarray, "_"]:
  """Returns the numbers of the shapes that `sort` keeps, the fullest first."""
  counts = np.bincount(_nearest(own, ratios), minlength=len(ratios))
  fullest = np.argsort(-counts, kind="stable")[:most]
  kept = fullest[counts[fullest] > 0]
  while True:
    counts = np.bincount(_nearest(own, ratios[kept]), minlength=len(kept))
    order = np.argsort(-counts, kind="stable")
    if len(kept) < 2 or counts[order[-1]] >= least:
      return kept[order]
    kept = kept[np.delete(np.arange(len(kept)), order[-1])]


def group(
  sources: Sequence[Sizes], weights: Sequence[float], max_buckets: int
) -> Bucketing:
  """Groups records that are stored at the shapes they are trained at.

  They cannot be moved to another shape, so all shapes stay; see `repeating`.

  Raises:
    ValueError: a source has no usable record, or there are more shapes than
      `max_buckets`.
  """
  shapes, which, counts = np.unique(
    np.concatenate(
      [np.stack([s.height, s.width], axis=1)[_usable(s)] for s in sources]
    ),
    axis=0,
    return_inverse=True,
    return_counts=True,
  )
  if len(shapes) > max_buckets:
    raise ValueError(
      f"data.max_buckets is {max_buckets}, but the records are stored at "
      f"{len(shapes)} shapes. Raise it, or make the cache with fewer."
    )
  usable = [_usable(sizes) for sizes in sources]
  ends = np.cumsum([len(records) for records in usable])
  which = np.split(which.reshape(-1), ends[:-1])
  return _bucketing(
    sources,
    weights,
    {
      int(bucket): (int(shapes[bucket, 0]), int(shapes[bucket, 1]))
      for bucket in np.argsort(-counts, kind="stable")
    },
    list(zip(usable, which, which, strict=True)),
  )


def repeating(bucketing: Bucketing, batch_size: int) -> dict[Shape, int]:
  """Counts the records of shapes of fewer than a batch, by shape.

  Each of their batches has records of several passes, some more than once.
  """
  counts = {
    shape: sum(len(p.members[number]) for p in bucketing.populations)
    for number, shape in enumerate(bucketing.shapes)
  }
  return {s: count for s, count in counts.items() if count < batch_size}


_NONE = np.zeros(0, np.int64)


def _usable(sizes: Sizes) -> Int64[np.ndarray, "_"]:
  good = np.ones(len(sizes.height), bool)
  good[list(sizes.problems)] = False
  return np.flatnonzero(good)


def _nearest(
  ratio: Float[np.ndarray, "n"], ratios: Float[np.ndarray, "k"]
) -> Int64[np.ndarray, "n"]:
  """Returns the number of the closest of `ratios`, the flatter one of two."""
  order = np.argsort(ratios, kind="stable")
  middles = (ratios[order][:-1] + ratios[order][1:]) / 2
  return order[np.searchsorted(middles, ratio, side="left")]


def _bucketing(sources, weights, shapes, sorted_records) -> Bucketing:
  """Args: shapes by bucket; of each source (records, best, final bucket)."""
  populations, reports = [], []
  for sizes, weight, (records, best, final) in zip(
    sources, weights, sorted_records, strict=True
  ):
    left_out: dict[str, list[str]] = {}
    for index, reason in sorted(sizes.problems.items()):
      left_out.setdefault(reason, []).append(sizes.key(index))
    report = EpochReport(
      *(sizes.name, len(sizes.height), len(records)),
      *(left_out, int((best != final).sum())),
    )
    if not report.used:
      raise ValueError(f"No record can be used of {report}.")
    members = tuple(records[final == bucket] for bucket in shapes)
    populations.append(sampler.Population(sizes.name, weight, members))
    reports.append(report)
  return Bucketing(tuple(shapes.values()), tuple(populations), tuple(reports))


def digest(population: sampler.Population) -> str:
  """Returns a hash of which records are in which bucket."""
  found = hashlib.sha256()
  for members in population.members:
    content = np.ascontiguousarray(members, "<i8").tobytes()
    found.update(len(content).to_bytes(8, "little") + content)
  return found.hexdigest()


def describe(bucketing: Bucketing, plans: sampler.BatchSampler) -> list[str]:
  """Returns lines that say what is read, and what shapes an epoch has."""
  lines = [str(report) for report in bucketing.reports]
  batches = plans.batches_per_epoch()
  few = repeating(bucketing, plans.batch_size)
  for count, shape in zip(batches, bucketing.shapes, strict=True):
    line = f"{shape[0]}x{shape[1]}: {float(count):.1f} batches per epoch"
    if shape in few:
      line += (
        f"; of {few[shape]} pictures, fewer than a batch of {plans.batch_size} "
        "has: batches repeat them"
      )
    lines.append(line)
  return lines
