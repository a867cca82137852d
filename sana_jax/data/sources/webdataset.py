"""WebDataset: pictures and their descriptions in tar files.

The members `a.jpg`, `a.txt`, `a.json` are one record, as files of a folder
are. Tar files have no table of contents, so their headers are read once, when
the source is opened; after that, every record can be read by itself.
"""

import dataclasses
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any

from sana_jax.data import records, storage
from sana_jax.data.sources import access, caption_files, grouping, sidecars

_THREADS = 16
_GZIP, _ZSTD, _XZ, _BZ2 = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\xfd7zXZ", b"BZh"


@dataclasses.dataclass(frozen=True, slots=True)
class _Span:
  """Where a member's bytes are within its tar file."""

  start: int
  size: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Entry:
  """A record's members; `captions` go with suffixes of their names."""

  key: str
  member: str
  shard: int
  image: _Span
  text: _Span | None
  captions: tuple[tuple[str, _Span], ...]
  scores: tuple[_Span, ...]


class TarSource(access.FileSource):
  """Records of tar files, in the order of the files and then of the keys.

  A key is a member's name without its last suffix; when two tar files have
  the same one, the tar's name goes before all keys.

  Args:
    shards: the tar files.
    name: of the source.
    tables: JSON files of whole shards; see `sidecars`.

  Raises:
    ValueError: a file is no plain tar file or is cut off.
    FileNotFoundError: there is no picture.
  """

  def __init__(
    self,
    shards: Sequence[storage.Location],
    name: str,
    tables: sidecars.Sidecars | None = None,
  ):
    self.name = name
    self._shards = tuple(shards)
    self._tables = tables or sidecars.Sidecars.beside(self._shards)
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      scanned = list(pool.map(_scan, range(len(shards)), self._shards))
    self._entries = [entry for entries, _ in scanned for entry in entries]
    self.counts = tuple(len(entries) for entries, _ in scanned)
    self.orphans = tuple(
      f"{shard.name}:{member}"
      for shard, (_, orphans) in zip(self._shards, scanned, strict=True)
      for member in orphans
    )
    if not self._entries:
      raise FileNotFoundError(
        f"No pictures in the {len(shards)} tar file(s) of {name}: expected "
        "members that end with "
        f"{', '.join(sorted(grouping.IMAGE_SUFFIXES))}."
      )
    keys = [entry.key for entry in self._entries]
    self._prefixed = len(set(keys)) < len(keys)
    if self._prefixed:
      access.require_unique(self.keys(), name)

  def __len__(self) -> int:
    return len(self._entries)

  def keys(self) -> list[str]:
    return [self._key(entry) for entry in self._entries]

  def file_name(self, index: int) -> str:
    return self._entries[index].member

  def image_head(self, index: int, size: int) -> bytes:
    entry = self._entries[self._checked(index)]
    start = entry.image.start
    stop = start + min(size, entry.image.size)
    return self._shards[entry.shard].read(start, stop)

  def _key(self, entry: _Entry) -> str:
    if not self._prefixed:
      return entry.key
    shard = grouping.split_suffix(self._shards[entry.shard].name)[0]
    return f"{shard}/{entry.key}"

  def _read(self, index: int) -> records.Record:
    entry = self._entries[index]
    stem = posixpath.basename(grouping.split_suffix(entry.member)[0])
    texts: dict[str, str] = {}
    scores: dict[str, float] = {}
    for suffix, span in entry.captions:
      value = self._json(entry, span)
      texts |= caption_files.from_json(value, stem, suffix)
    for span in entry.scores:
      where = self._where(entry)
      value = self._json(entry, span)
      scores |= caption_files.scores_from_json(value, stem, where)
    more_texts, more_scores = self._tables.find(entry.shard, entry.key, stem)
    text = None
    if entry.text is not None:
      content = self._bytes(entry, entry.text)
      text = caption_files.from_text(content, self._where(entry))
    return records.Record(
      key=self._key(entry),
      image=self._bytes(entry, entry.image),
      captions=caption_files.assemble(
        texts | more_texts, scores | more_scores, text
      ),
    )

  def _where(self, entry: _Entry) -> str:
    return f"What describes {entry.member} in {self._shards[entry.shard]}"

  def _bytes(self, entry: _Entry, span: _Span) -> bytes:
    if not span.size:
      return b""
    shard = self._shards[entry.shard]
    return shard.read(span.start, span.start + span.size)

  def _json(self, entry: _Entry, span: _Span) -> Mapping[str, Any]:
    content = self._bytes(entry, span)
    return caption_files.parse_json(content, self._where(entry))


def _scan(
  number: int, shard: storage.Location
) -> tuple[list[_Entry], list[str]]:
  """Reads a tar file's headers; returns its records and orphans."""
  spans = _members(shard)
  groups, orphans = grouping.group(list(spans))
  entries = [
    _Entry(
      key=group.key,
      member=group.image,
      shard=number,
      image=spans[group.image],
      text=spans[group.text] if group.text else None,
      captions=tuple((s, spans[name]) for s, name in group.captions),
      scores=tuple(spans[name] for name in group.scores),
    )
    for group in groups
  ]
  return entries, orphans


def _members(shard: storage.Location) -> dict[str, _Span]:
  """Returns where the regular files of a tar file are, by name."""
  if not shard.is_file():
    raise FileNotFoundError(f"There is no tar file {shard}.")
  size = shard.size()
  spans = {}
  try:
    with (
      shard.open() as file,
      # Explicitly uncompressed: nothing else has random access.
      tarfile.open(fileobj=file, mode="r:") as tar,
    ):
      for member in tar:
        tar.members = []  # Or tarfile keeps every header.
        if member.isreg() and member.sparse is None:
          name = posixpath.normpath(member.name)
          spans[name] = _Span(member.offset_data, member.size)
  except tarfile.TarError as error:
    raise ValueError(f"{shard} {_trouble(shard, error)}") from error
  for name, span in spans.items():
    if span.start + span.size > size:
      raise ValueError(
        f"{shard} is cut off within {name!r}: it has {size:,} bytes, expected "
        f"at least {span.start + span.size:,}. Copy it again."
      )
  return spans


def _trouble(shard: storage.Location, error: tarfile.TarError) -> str:
  head = shard.read(0, 8)
  if head.startswith((_GZIP, _ZSTD, _XZ, _BZ2)):
    return (
      "is compressed: expected a plain tar file, of which any record can be "
      "read without the ones before it. Decompress it."
    )
  return f"cannot be read as a tar file: {error}."
