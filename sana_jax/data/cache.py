"""Latents and text states on disk: shards of ArrayRecord, and a manifest.

A directory holds

- `shard-00000-of-00012.array_record` and so on, in the order of the source;
- `manifest.json`: what the cache was made from and with, see `cache_manifest`;
- `buckets.npy`: for each record the number of its bucket, uint16 [n];
- `null_caption.npy`: text states of the empty caption, bfloat16 as uint16
  [max_sequence_length, d], padding included: a dropped caption may be trained
  with the mask of the caption it replaces. Absent without text states.

`cache_records` describes the bytes of a record.
"""

import functools
import operator
import os
import pathlib
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
from array_record.python import array_record_data_source
from etils import epath
from jaxtyping import BFloat16, Int

from sana_jax.data import cache_manifest, cache_records

BUCKETS = "buckets.npy"
NULL_CAPTION = "null_caption.npy"


class CachedSource:
  """Random access to the records of a cache; may be pickled.

  Attributes:
    name: says in messages which cache it is.
    buckets: for each record the number of its bucket in
      `manifest.settings.buckets`.

  Raises:
    FileNotFoundError: it is not finished, or a shard is missing.
    ValueError: something is broken, it has no records, or is not on a disk.
  """

  def __init__(self, path: epath.PathLike):
    if "://" in os.fspath(path):
      raise ValueError(
        f"{path} is not on a local disk: caches have random access there only. "
        "Copy it, or mount the bucket (gcsfuse)."
      )
    self._path = pathlib.Path(path)
    self.name = str(path)
    self.manifest = cache_manifest.Manifest.read(path)
    shards = [shard for shard in self.manifest.shards if shard.records]
    if not shards:
      raise ValueError(f"{path} has no records: all pictures were skipped.")
    self._check_files(shards)
    self._records = array_record_data_source.ArrayRecordDataSource(
      # With the range, no file is opened before it is read from.
      [f"{self._path / shard.file}[0:{shard.records}]" for shard in shards]
    )
    self.buckets = np.load(self._path / BUCKETS)
    if self.buckets.shape != (len(self),):
      raise ValueError(
        f"{self._path / BUCKETS} describes {len(self.buckets)} records, the "
        f"manifest {len(self)}; run python -m sana_jax.precompute again."
      )

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: SupportsIndex) -> cache_records.Record:
    return self.__getitems__([operator.index(index)])[0]

  def __getitems__(
    self, indices: Sequence[int] | Int[np.ndarray, "n"]
  ) -> list[cache_records.Record]:
    """Reads several records, those of a shard in one go.

    Raises:
      ValueError: a shard is damaged.
    """
    try:
      found = self._records.__getitems__(indices)
    except RuntimeError as error:
      raise ValueError(
        f"{self.name}: {self._files_of(indices)} is damaged ({error}); copy it "
        "again, or delete it, with the .json beside it, and run python -m "
        "sana_jax.precompute again."
      ) from error
    return [cache_records.decode(content) for content in found]

  def _files_of(self, indices: Sequence[int] | Int[np.ndarray, "n"]) -> str:
    """Names the shards that records are in."""
    ends = np.cumsum([shard.records for shard in self.manifest.shards])
    numbers = np.unique(np.searchsorted(ends, np.asarray(indices), "right"))
    return " or ".join(self.manifest.shards[n].file for n in numbers)

  @functools.cached_property
  def _null_caption(self) -> BFloat16[np.ndarray, "l d"]:
    path = self._path / NULL_CAPTION
    return np.load(path).view(cache_records.BFLOAT16)

  def null_caption(self) -> BFloat16[np.ndarray, "l d"]:
    """Returns the states of the empty caption, all max_sequence_length.

    Raises:
      ValueError: the cache has latents only.
    """
    if not self.manifest.has_text:
      raise ValueError(
        f"{self.name} has no text states; make the cache again without "
        "--latents_only, or give training a text encoder."
      )
    return self._null_caption

  def _check_files(self, shards: Sequence[cache_manifest.Shard]) -> None:
    wrong = []
    for shard in shards:
      path = self._path / shard.file
      size = path.stat().st_size if path.is_file() else None
      if size != shard.bytes:
        wrong.append(f"{shard.file} ({size or 'no'} bytes, not {shard.bytes})")
    if wrong:
      raise FileNotFoundError(
        f"{self._path} lacks shards, or has other ones than its manifest says: "
        f"{', '.join(wrong[:5])}, {len(wrong)} in all; copy them again, or run "
        "python -m sana_jax.precompute again."
      )
