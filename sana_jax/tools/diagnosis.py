"""What is wrong with a data set as a whole."""

import collections
import dataclasses
import importlib.resources
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent import futures
from typing import Any

import numpy as np
import tqdm

from sana_jax import resolution, text
from sana_jax.data.sources import access
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
  "tiny": ("warning", "pictures are smaller than their bucket"),
  "extreme_aspect": ("warning", "pictures lose much to cropping"),
  "wrong_extension": ("warning", "pictures are not what their names say"),
  "cmyk": ("warning", "pictures are CMYK"),
  "sixteen_bit": ("warning", "pictures have more than 8 bits"),
  "palette": ("warning", "pictures have a palette"),
  "animated": ("warning", "pictures are animated"),
  "rotated": ("info", "pictures are turned by EXIF data"),
}
_MOST_BITS = 4  # Of 128 that differ between pictures that are called alike.
_MOST_COLOR = 3.0  # Of 255.
_ASPECT_EDGES = (0.25, 0.5, 0.67, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0, 4.0)
_SIDE_EDGES = (256, 512, 768, 1024, 1536, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a data set is to be used for."""

  image_size: int
  batch_size: int
  max_tokens: int
  tokenizer: text.Tokenizer
  tokenizer_name: str

  @property
  def sample_size(self) -> int:
    return self.image_size // resolution.COMPRESSION

  @classmethod
  def load(
    cls,
    image_size: int,
    batch_size: int,
    tokenizer: str | None,
    max_tokens: int,
  ) -> "Settings":
    """Reads the tokenizer, the bundled one for None."""
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
    return cls(image_size, batch_size, max_tokens, loaded, name)

  def count_tokens(self, caption: str) -> int:
    return len(self.tokenizer.tokenize(caption))


def examine_all(
  source: access.FileSource, settings: Settings, num_threads: int
) -> list[examination.Examined]:
  """Examines every record, and compares them with each other."""

  def examine(index: int) -> examination.Examined:
    return examination.examine(
      source,
      index,
      settings.sample_size,
      settings.count_tokens,
      settings.max_tokens,
    )

  with futures.ThreadPoolExecutor(num_threads) as pool:
    results = pool.map(examine, range(len(source)))
    examined = list(tqdm.tqdm(results, "examine", len(source), unit="img"))
  for later, earlier in duplicates(examined):
    later.findings.append(
      examination.Finding("duplicate", f"like {earlier.key}")
    )
  return examined


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
  settings: Settings,
) -> dict[str, Any]:
  """Returns the report, which may be written as JSON."""
  items: dict[str, list[dict[str, str]]] = {code: [] for code in MEANINGS}
  for record in examined:
    for finding in record.findings:
      items[finding.code].append({"key": record.key, "detail": finding.detail})
  items["orphan"] += [
    {"key": name, "detail": "no picture of this name"}
    for name in source.orphans
  ]
  findings = {
    code: {
      "level": MEANINGS[code][0],
      "meaning": MEANINGS[code][1],
      "count": len(found),
      "items": found,
    }
    for code, found in items.items()
    if found
  }
  sizes = [record.size for record in examined if record.size]
  buckets = _buckets(sizes, settings)
  return {
    "source": source.name,
    "records": len(source),
    "usable": bool(sizes),
    "healthy": all(f["level"] == "info" for f in findings.values()),
    "image_size": settings.image_size,
    "batch_size": settings.batch_size,
    "tokenizer": settings.tokenizer_name,
    "findings": findings,
    "resolutions": _histogram([min(size) for size in sizes], _SIDE_EDGES),
    "aspects": _histogram([h / w for h, w in sizes], _ASPECT_EDGES),
    "buckets": buckets,
    "leftover": sum(b["count"] % settings.batch_size for b in buckets),
  }


def _buckets(
  sizes: Sequence[tuple[int, int]], settings: Settings
) -> list[dict[str, Any]]:
  losses: dict[tuple[int, int], list[float]] = collections.defaultdict(list)
  for size in sizes:
    bucket = resolution.closest_bin(size[0] / size[1], settings.sample_size)
    losses[bucket].append(examination.crop_loss(size, bucket))
  return [
    {
      "height": height,
      "width": width,
      "count": len(lost),
      "batches": len(lost) // settings.batch_size,
      "cropped": float(np.mean(lost)),
    }
    for (height, width), lost in sorted(losses.items())
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
