"""What is wrong with a data set as a whole."""

import collections
import dataclasses
import importlib.resources
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import tqdm

from sana_jax import text
from sana_jax.data import buckets, sampler
from sana_jax.data.sources import access, grouping
from sana_jax.tools import examination

# Code -> level and what it counts. Information does not make a data set ill.
MEANINGS = {
  "unreadable_record": ("error", "records cannot be read"),
  "unreadable": ("error", "pictures cannot be opened"),
  "truncated": ("error", "pictures are cut off or damaged"),
  "missing_caption": ("warning", "pictures have no caption"),
  "empty_caption": ("warning", "captions are empty"),
  "long_caption": ("warning", "captions are too long"),
  "orphan": ("warning", "files describe no picture"),
  "duplicate": ("warning", "pictures are like an earlier one"),
  "not_read": ("warning", "pictures are of a kind that is not read"),
  "transparent": ("warning", "pictures are wholly transparent"),
  "single_color": ("warning", "pictures have one colour only"),
  "tiny": ("warning", "pictures are smaller than their bucket"),
  "extreme_aspect": ("warning", "pictures lose much to cropping"),
  "wrong_extension": ("warning", "pictures are not what their names say"),
  "cmyk": ("warning", "pictures are CMYK"),
  "sixteen_bit": ("warning", "pictures have more than 8 bits"),
  "animated": ("warning", "pictures are animated"),
  "low_score": ("info", "pictures are left out for their CLIP score"),
  "palette": ("info", "pictures have a palette"),
  "other_file": ("info", "files are neither pictures nor about any"),
  "rotated": ("info", "pictures are turned by EXIF data"),
}
_MOST_BITS = 4  # Of 128 that differ between pictures that are called alike.
_MOST_COLOR = 3.0  # Of 255.
# A picture that loses more of its area to its bucket is probably misplaced;
# where there is one shape for all, ordinary ones lose a third.
_MOST_CROPPED, _MOST_CROPPED_TO_ONE = 0.2, 0.5
_ASPECT_EDGES = (0.25, 0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 4.0)
_SIDE_EDGES = (256, 512, 768, 1024, 1536, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a data set is to be used for.

  Attributes:
    multiple: see `buckets.table`.
    shapes: likewise.
    max_buckets: see `buckets.sort`.
    max_tokens: that a caption may have.
    min_clip_score: see `filtering.require_score`.
  """

  image_size: int
  multiple: int
  shapes: Mapping[float, buckets.Shape]
  max_buckets: int
  batch_size: int
  max_tokens: int
  tokenizer: text.Tokenizer
  tokenizer_name: str
  min_clip_score: float = 0.0

  @classmethod
  def load(
    cls,
    *,
    image_size: int,
    kind: str,
    multiple: int,
    max_buckets: int,
    batch_size: int,
    tokenizer: str | None,
    max_tokens: int,
    min_clip_score: float = 0.0,
  ) -> "Settings":
    """Reads the tokenizer, the bundled one for None.

    Args:
      kind: see `buckets.table`, as `image_size` and `multiple`.

    Raises:
      FileNotFoundError: there is no tokenizer.
      ValueError: it is unusable, or the size is no multiple.
    """
    if tokenizer is None:
      bundled = importlib.resources.files("sana_jax.assets") / "emoji_model"
      directory = pathlib.Path(str(bundled / "tokenizer"))
      name = (
        "the bundled one of the emoji, which makes more tokens of a text than "
        "Gemma's; pass --tokenizer for exact counts"
      )
    else:
      directory, name = pathlib.Path(tokenizer), tokenizer
    loaded = text.Tokenizer.from_pretrained(directory)
    shapes = buckets.table(kind, image_size, multiple)
    return cls(
      *(image_size, multiple, shapes, max_buckets, batch_size),
      *(max_tokens, loaded, name, min_clip_score),
    )

  def count_tokens(self, caption: str) -> int:
    return len(self.tokenizer.tokenize(text.prepare(caption)))


def examine_all(
  source: access.FileSource, settings: Settings, num_threads: int
) -> list[examination.Examined]:
  """Examines every record, and compares them with each other.

  Tells of the pictures, not of what training makes of them; see `sort`.
  """

  def examine(index: int) -> examination.Examined:
    return examination.examine(
      *(source, index, settings.count_tokens),
      *(settings.max_tokens, settings.min_clip_score),
    )

  with futures.ThreadPoolExecutor(num_threads) as pool:
    results = pool.map(examine, range(len(source)))
    examined = list(tqdm.tqdm(results, "examine", len(source), unit="img"))
  for later, earlier in duplicates(examined):
    later.findings.append(
      examination.Finding("duplicate", f"like {earlier.key}")
    )
  return examined


class Sorted(NamedTuple):
  """What training makes of the pictures that are used.

  Attributes:
    bucketing: None: none is used.
    plans: likewise.
  """

  bucketing: buckets.Bucketing | None
  plans: sampler.BatchSampler | None


def sort(
  name: str, examined: Sequence[examination.Examined], settings: Settings
) -> Sorted:
  """Sorts pictures into buckets as training does, and adds what that finds."""
  if not any(record.used for record in examined):
    return Sorted(None, None)
  sizes = np.array([record.size or (0, 0) for record in examined], np.int32)
  problems = {i: "not used" for i, e in enumerate(examined) if not e.used}
  sources = [buckets.Sizes(name, sizes[:, 0], sizes[:, 1], problems)]
  bucketing = buckets.sort(
    sources,
    [1.0],
    settings.shapes,
    settings.max_buckets,
    least=settings.batch_size,
  )
  best = buckets.sort(sources, [1.0], settings.shapes, len(settings.shapes))
  best_shapes = dict(_members(best))
  most = _MOST_CROPPED if len(bucketing.shapes) > 1 else _MOST_CROPPED_TO_ONE
  for index, shape in _members(bucketing):
    record = examined[index]
    record.findings += _fit(record.size, shape, best_shapes[index], most)
  (population,) = bucketing.populations
  plans = sampler.BatchSampler([population], settings.batch_size, seed=0)
  return Sorted(bucketing, plans)


def _members(
  bucketing: buckets.Bucketing,
) -> Iterator[tuple[int, buckets.Shape]]:
  """Yields the number of every record that is used, and its shape."""
  (population,) = bucketing.populations
  for shape, members in zip(bucketing.shapes, population.members, strict=True):
    for index in members:
      yield int(index), shape


def _fit(
  size: tuple[int, int],
  shape: buckets.Shape,
  best: buckets.Shape,
  most_cropped: float,
) -> Iterator[examination.Finding]:
  """Args: shape that is trained at; best of all, also of those not kept."""
  (height, width), where = size, "{} x {}".format(*shape)
  if height * width < shape[0] * shape[1]:
    detail = f"{height} x {width}, its bucket is {where}"
    yield examination.Finding("tiny", detail)
  if (loss := crop_loss(size, shape)) > most_cropped:
    detail = f"{height} x {width} loses {loss:.0%} in {where}"
    if best != shape:
      detail += ", as {} x {} is not kept".format(*best)
    yield examination.Finding("extreme_aspect", detail)


def crop_loss(size: tuple[int, int], bucket: tuple[int, int]) -> float:
  """Returns the part of a picture's area that covering a bucket cuts off."""
  ratio, goal = size[0] / size[1], bucket[0] / bucket[1]
  return 1 - min(ratio / goal, goal / ratio)


def duplicates(
  examined: Iterable[examination.Examined],
) -> list[tuple[examination.Examined, examination.Examined]]:
  """Pairs pictures with the earlier one that they look like.

  At most `_MOST_BITS` bits of the outlines differ, so of one more bands than
  that at least one is equal: only pictures that share a band are compared.
  """
  pairs = []
  bands: dict[tuple[int, bytes], list[examination.Examined]]
  bands = collections.defaultdict(list)
  for item in examined:
    if item.colors is None:
      continue
    parts = np.array_split(
      np.frombuffer(item.outline, np.uint8), _MOST_BITS + 1
    )
    names = [(i, part.tobytes()) for i, part in enumerate(parts)]
    candidates = (other for name in names for other in bands[name])
    original = next((c for c in candidates if _alike(item, c)), None)
    if original is not None:
      pairs.append((item, original))
      continue
    for name in names:
      bands[name].append(item)
  return pairs


def _alike(a: examination.Examined, b: examination.Examined) -> bool:
  bits = int.from_bytes(a.outline) ^ int.from_bytes(b.outline)
  if bits.bit_count() > _MOST_BITS:
    return False
  return float(np.abs(a.colors - b.colors).mean()) <= _MOST_COLOR


def summarize(
  source: access.FileSource,
  examined: Sequence[examination.Examined],
  found: Sorted,
  settings: Settings,
) -> dict[str, Any]:
  """Returns the report, which may be written as JSON."""
  items: dict[str, list[dict[str, str]]] = {code: [] for code in MEANINGS}
  for record in examined:
    for finding in record.findings:
      items[finding.code].append({"key": record.key, "detail": finding.detail})
  for code, pairs in _files(source).items():
    items[code] += [{"key": name, "detail": detail} for name, detail in pairs]
  findings = {
    code: {
      "level": MEANINGS[code][0],
      "meaning": MEANINGS[code][1],
      "count": len(those),
      "items": those,
    }
    for code, those in items.items()
    if those
  }
  sizes = [record.size for record in examined if record.used]
  shapes = _buckets(examined, found)
  return {
    "source": source.name,
    "records": len(source),
    "usable": bool(sizes),
    "healthy": all(f["level"] == "info" for f in findings.values()),
    "image_size": settings.image_size,
    "multiple": settings.multiple,
    "max_buckets": settings.max_buckets,
    "batch_size": settings.batch_size,
    "min_clip_score": settings.min_clip_score,
    "tokenizer": settings.tokenizer_name,
    "findings": findings,
    "resolutions": _histogram([min(size) for size in sizes], _SIDE_EDGES),
    "aspects": _histogram([h / w for h, w in sizes], _ASPECT_EDGES),
    "buckets": shapes,
    "batches_per_epoch": sum(bucket["batches"] for bucket in shapes),
    "moved": found.bucketing.reports[0].moved if found.bucketing else 0,
    **_unverified(examined),
  }


def _unverified(examined: Iterable[examination.Examined]) -> dict[str, Any]:
  """Returns what training counts though it cannot be decoded, and a remedy."""
  keys = [e.key for e in examined if e.size is None and e.counted]
  advice = (
    f"{len(keys):,} broken records have a header that can be read: training "
    "counts them, unlike the buckets here, and stops at the first that it "
    "meets, unless it is told --config.data.verify=True, which leaves them out "
    "as is done here. Do that, or remove them."
  )
  return {"unverified": keys, "advice": [advice] if keys else []}


def _files(source: access.FileSource) -> dict[str, list[tuple[str, str]]]:
  """Returns what the doctor says of files that are in no record, by code."""
  hidden = "hidden files and those of hidden directories are not read"
  return {
    "orphan": [(name, "no picture of this name") for name in source.orphans],
    "not_read": [
      (
        name,
        hidden
        if kind == grouping.HIDDEN
        else f"{kind} is not read; convert it to .png or .jpg",
      )
      for name, kind in source.unread.items()
    ],
    "other_file": [(name, "left alone") for name in source.others],
  }


def _buckets(
  examined: Sequence[examination.Examined], found: Sorted
) -> list[dict[str, Any]]:
  if found.bucketing is None:
    return []
  (population,) = found.bucketing.populations
  return [
    {
      "height": shape[0],
      "width": shape[1],
      "count": len(members),
      "batches": float(batches),
      "cropped": float(
        np.mean([crop_loss(examined[i].size, shape) for i in members])
      ),
    }
    for shape, members, batches in zip(
      found.bucketing.shapes,
      population.members,
      found.plans.batches_per_epoch(),
      strict=True,
    )
  ]


def _histogram(
  values: Sequence[float], edges: Sequence[float]
) -> Mapping[str, int]:
  names = [f"below {edges[0]}"]
  names += [f"{a}-{b}" for a, b in zip(edges, edges[1:], strict=False)]
  names.append(f"from {edges[-1]}")
  places = np.searchsorted(edges, values, "right") if len(values) else []
  counts = collections.Counter(int(place) for place in places)
  return {name: counts[i] for i, name in enumerate(names) if counts[i]}
