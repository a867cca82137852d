"""Which shape a picture is trained at, and what became of every record."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int, Int64

from sana_jax import resolution
from sana_jax.data import sampler

Shape = tuple[int, int]

# Reasons that a report's text has; messages may differ from file to file.
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Sizes:
  """The sizes of a source's pictures.

  Attributes:
    name: of the source.
    height: in pixels; of a record with a problem, anything.
    width: likewise.
    problems: why a record cannot be used, by its number.
  """

  name: str
  height: Int[np.ndarray, "n"]
  width: Int[np.ndarray, "n"]
  problems: Mapping[int, str]


@dataclasses.dataclass(frozen=True)
class EpochReport:
  """What one pass through a source reads, and what it does not.

  Attributes:
    source: its name.
    read: records of the source.
    used: those that are trained on.
    skipped: how many are not, by reason.
    moved: how many are trained at another shape than the best of the table,
      because only the fullest buckets are kept.
  """

  source: str
  read: int
  used: int
  skipped: Mapping[str, int]
  moved: int

  def __str__(self) -> str:
    text = f"{self.source}: {self.read} records, {self.used} used"
    common = sorted(self.skipped.items(), key=lambda item: (-item[1], item[0]))
    for reason, count in common[:_SHOWN]:
      text += f", {count} skipped ({reason})"
    if rest := common[_SHOWN:]:
      count = sum(count for _, count in rest)
      text += f", {count} skipped for {len(rest)} other reasons"
    if self.moved:
      text += f", {self.moved} moved to a kept shape"
    return text


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
) -> Bucketing:
  """Sorts records by the shape whose ratio is nearest to theirs.

  Only the `max_buckets` fullest shapes are kept, for each is compiled; other
  records go to the nearest of those.

  Args:
    weights: of the sources in training; the shapes do not depend on them.
    shapes: see `table`.

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
  counts = np.bincount(np.concatenate(best), minlength=len(ratios))
  fullest = np.argsort(-counts, kind="stable")[:max_buckets]
  kept = fullest[counts[fullest] > 0]
  final = [kept[_nearest(r, ratios[kept])] if r.size else _NONE for r in own]
  return _bucketing(
    sources,
    weights,
    {int(bucket): values[bucket] for bucket in kept},
    list(zip(usable, best, final, strict=True)),
  )


def group(
  sources: Sequence[Sizes], weights: Sequence[float], max_buckets: int
) -> Bucketing:
  """Groups records that are stored at the shapes they are trained at.

  Raises:
    ValueError: a source has no usable record, or there are more shapes than
      `max_buckets`.
  """
  usable = [_usable(sizes) for sizes in sources]
  own = [
    np.stack([sizes.height[records], sizes.width[records]], axis=1)
    for sizes, records in zip(sources, usable, strict=True)
  ]
  shapes, which, counts = np.unique(
    np.concatenate(own), axis=0, return_inverse=True, return_counts=True
  )
  if len(shapes) > max_buckets:
    raise ValueError(
      f"data.max_buckets is {max_buckets}, but the records are stored at "
      f"{len(shapes)} shapes. Raise it, or make the cache with fewer."
    )
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
    report = EpochReport(
      sizes.name,
      len(sizes.height),
      len(records),
      collections.Counter(sizes.problems.values()),
      int((best != final).sum()),
    )
    if not report.used:
      raise ValueError(f"No record can be used of {report}.")
    members = tuple(records[final == bucket] for bucket in shapes)
    populations.append(sampler.Population(sizes.name, weight, members))
    reports.append(report)
  return Bucketing(tuple(shapes.values()), tuple(populations), tuple(reports))


def describe(bucketing: Bucketing, plans: sampler.BatchSampler) -> list[str]:
  """Returns lines that say what is read, and what shapes an epoch has."""
  lines = [str(report) for report in bucketing.reports]
  batches = plans.batches_per_epoch()
  for (height, width), count in zip(bucketing.shapes, batches, strict=True):
    lines.append(f"{height}x{width}: {float(count):.1f} batches per epoch")
  return lines
