"""Measures what a cache keeps of its pictures: decodes some, and compares."""

import collections
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Float, UInt8

from sana_jax import images as images_lib
from sana_jax import storage
from sana_jax.data import cache, cache_manifest
from sana_jax.precompute import shards

REPORT = "report.json"
WORST = "worst.png"
_WORST = 8
_THUMBNAIL = (256, 256)
# Pictures that an autoencoder was trained on come back closer than this.
_LEAST_PSNR = 20.0


class Compared(NamedTuple):
  """A picture and what comes out of its latents.

  Attributes:
    psnr: peak signal-to-noise ratio in decibels; higher is closer.
    picture: as it was encoded, in [0, 1].
  """

  key: str
  shape: tuple[int, int]
  psnr: float
  picture: UInt8[np.ndarray, "h w 3"]
  decoded: UInt8[np.ndarray, "h w 3"]


def compare(
  maker: shards.Maker,
  cached: cache.CachedSource,
  finished: Sequence[shards.Finished],
  count: int,
) -> list[Compared]:
  """Decodes records that are spread evenly over the cache.

  Args:
    finished: all shards, in order.
    count: of pictures; all, if there are fewer.

  Raises:
    ValueError: a picture is not the one that was encoded.
  """
  numbers = [index for shard in finished for index in shard.indices]
  count = min(count, len(numbers))
  chosen = [i * len(numbers) // count for i in range(count)]
  of_bucket = collections.defaultdict(list)
  for position in chosen:
    of_bucket[int(cached.buckets[position])].append(position)
  size = maker.encoders.batch_size
  return [
    compared
    for _, positions in sorted(of_bucket.items())
    for start in range(0, len(positions), size)
    for compared in _compare_batch(
      maker, cached, numbers, positions[start : start + size]
    )
  ]


def _compare_batch(maker, cached, numbers, positions) -> list[Compared]:
  kept = cached.__getitems__(positions)
  read = maker.source.__getitems__(
    [numbers[position] for position in positions]
  )
  decoded = images_lib.to_uint8(
    maker.encoders.decode_latents(np.stack([record.latents for record in kept]))
  )
  compared = []
  for record, original, ours in zip(kept, read, decoded, strict=True):
    picture = maker.fit(original, record.size)
    if original.key != record.key or isinstance(picture, str):
      raise ValueError(
        f"{record.key!r} of the cache is {original.key!r} of the source by "
        "now, or unreadable: the source has changed."
      )
    compared.append(
      Compared(record.key, record.size, psnr(picture, ours), picture, ours)
    )
  return compared


def psnr(a: UInt8[np.ndarray, "h w 3"], b: UInt8[np.ndarray, "h w 3"]) -> float:
  """Returns 10 log10(255^2 / mean squared error), at most 100 dB."""
  error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
  return float(min(100.0, 10 * np.log10(255**2 / max(error, 1e-9))))


def write(
  directory: storage.Directory,
  manifest: cache_manifest.Manifest,
  compared: Sequence[Compared],
) -> None:
  """Writes report.json, and the worst pictures above their decoded selves."""
  values = summary(manifest) | reconstruction(compared)
  if trouble := verdict(compared, manifest.checkpoint):
    values["warning"] = trouble
  content = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
  directory.write(REPORT, content.encode())
  if compared:
    directory.write(WORST, contact_sheet(_worst(compared)))
  directory.sync()


def summary(manifest: cache_manifest.Manifest) -> dict[str, Any]:
  """Returns sizes and what was skipped, as JSON values."""
  captions = manifest.total("captions")
  return {
    "records": manifest.records,
    "captions": captions,
    "truncated_captions": manifest.total("truncated_captions"),
    "skipped": manifest.skipped,
    "bytes": manifest.total("bytes"),
    "bytes_per_latent": manifest.total("latent_bytes")
    / max(manifest.records, 1),
    "bytes_per_caption": manifest.total("text_bytes") / max(captions, 1),
  }


def reconstruction(compared: Sequence[Compared]) -> Mapping[str, Any]:
  """Returns PSNR by bucket and the worst pictures; nothing without any."""
  if not compared:
    return {}
  of_bucket = collections.defaultdict(list)
  for each in compared:
    of_bucket["{}x{}".format(*each.shape)].append(each.psnr)
  return {
    "reconstruction": {
      "psnr_by_bucket": {
        name: {
          "count": len(values),
          "mean": float(np.mean(values)),
          "min": min(values),
        }
        for name, values in sorted(of_bucket.items())
      },
      "mean": float(np.mean([each.psnr for each in compared])),
      "worst": {each.key: each.psnr for each in _worst(compared)},
    }
  }


def is_compared(path: pathlib.Path) -> bool:
  """Returns whether a cache's report says how close its pictures come back.

  Raises:
    ValueError: there is a report that is broken.
  """
  file = path / REPORT
  if not file.is_file():
    return False
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{file} is no report ({error}); delete it.") from error
  return "reconstruction" in values


def verdict(compared: Sequence[Compared], checkpoint: str) -> str | None:
  """Says so when an autoencoder does not know such pictures; None: it does."""
  if not compared:
    return None
  mean = float(np.mean([each.psnr for each in compared]))
  if mean >= _LEAST_PSNR:
    return None
  return (
    f"the autoencoder of {checkpoint} does not know such pictures: decoded "
    f"again they have {mean:.1f} dB on average, less than {_LEAST_PSNR:g}, and "
    f"training can be no better. Look at {WORST}, and use a checkpoint whose "
    "autoencoder was trained on such pictures (--checkpoint)."
  )


def contact_sheet(compared: Sequence[Compared]) -> bytes:
  """Makes a PNG: pictures in the first row, decoded ones below."""
  rows = [c.picture for c in compared] + [c.decoded for c in compared]
  sheet = images_lib.grid(
    [_thumbnail(picture) for picture in rows], columns=len(compared)
  )
  psnrs = {each.key: each.psnr for each in compared}
  return images_lib.encode_png(sheet, {"psnr": json.dumps(psnrs)})


def _worst(compared: Sequence[Compared]) -> list[Compared]:
  return sorted(compared, key=lambda each: each.psnr)[:_WORST]


def _thumbnail(
  picture: UInt8[np.ndarray, "h w 3"],
) -> Float[np.ndarray, "256 256 3"]:
  padded = PIL.ImageOps.pad(
    PIL.Image.fromarray(picture), _THUMBNAIL, color="white"
  )
  return np.asarray(padded, np.float32) / 255
