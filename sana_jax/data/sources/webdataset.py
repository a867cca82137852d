"""WebDataset: pictures and their descriptions in tar files.

The members `a.jpg`, `a.txt`, `a.json` are one record, as files of a folder
are. Tar files have no table of contents, so all headers are read when the
source is opened.
"""

import dataclasses
import posixpath
import tarfile
from collections.abc import Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple, SupportsIndex

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
    orphans, unread, others = [], {}, []
    for shard, (_, strays) in zip(self._shards, scanned, strict=True):
      prefix = f"{shard.name}:"
      orphans += [prefix + member for member in strays.orphans]
      unread |= {prefix + m: kind for m, kind in strays.unread.items()}
      others += [prefix + member for member in strays.others]
    self.orphans, self.unread = tuple(orphans), unread
    self.others = tuple(others)
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

  def files(self) -> list[storage.Location]:
    return [*self._shards, *self._tables.files()]

  def key(self, index: int) -> str:
    return self._key(self._entries[index])

  def file_name(self, index: int) -> str:
    return self._entries[index].member

  def image_head(self, index: int, size: int) -> bytes:
    entry = self._entries[self._checked(index)]
    size = min(size, entry.image.size)
    return self._bytes(entry, _Span(entry.image.start, size))

  def _key(self, entry: _Entry) -> str:
    if not self._prefixed:
      return entry.key
    shard = grouping.split_suffix(self._shards[entry.shard].name)[0]
    return f"{shard}/{entry.key}"

  def _read(self, index: int) -> records.Record:
    entry = self._entries[index]
    return records.Record(
      key=self._key(entry),
      image=self._bytes(entry, entry.image),
      captions=self.captions(index),
    )

  def captions(self, index: SupportsIndex) -> tuple[records.Caption, ...]:
    entry = self._entries[self._checked(index)]
    stem = posixpath.basename(grouping.split_suffix(entry.member)[0])
    texts, scores = {}, {}
    for suffix, span in entry.captions:
      value, where = self._json(entry, span), self._where(entry)
      texts |= caption_files.from_json(value, stem, where, suffix)
      scores |= caption_files.scores_of(value, where)
    for span in entry.scores:
      scores |= caption_files.scores_from_json(
        self._json(entry, span), stem, self._where(entry)
      )
    more_texts, more_scores = self._tables.find(entry.shard, entry.key, stem)
    text = None
    if entry.text is not None:
      text = caption_files.from_text(
        self._bytes(entry, entry.text), self._where(entry)
      )
    return caption_files.assemble(
      texts | more_texts, scores | more_scores, text
    )

  def _where(self, entry: _Entry) -> str:
    return f"What describes {entry.member} in {self._shards[entry.shard]}"

  def _bytes(self, entry: _Entry, span: _Span) -> bytes:
    if not span.size:
      return b""
    stop = span.start + span.size
    return self._shards[entry.shard].read(span.start, stop)

  def _json(self, entry: _Entry, span: _Span) -> Mapping[str, Any]:
    return caption_files.parse_json(
      self._bytes(entry, span), self._where(entry)
    )


class _Strays(NamedTuple):
  """The members of a tar file that are in no record; see `FileSource`."""

  orphans: list[str]
  unread: dict[str, str]
  others: list[str]


def _scan(number: int, shard: storage.Location) -> tuple[list[_Entry], _Strays]:
  """Returns a tar file's records, and what belongs to none."""
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
  kinds = grouping.unread(spans)
  # Hidden members are read: whoever made the tar file wanted them.
  unread = {n: kind for n, kind in kinds.items() if kind != grouping.HIDDEN}
  return entries, _Strays(orphans, unread, grouping.others(spans))


def _members(shard: storage.Location) -> dict[str, _Span]:
  """Returns where the regular files of a tar file are, by name."""
  if not shard.is_file():
    raise FileNotFoundError(f"There is no tar file {shard}.")
  size, spans = shard.size(), {}
  try:
    with (
      shard.open() as file,
      tarfile.open(fileobj=file, mode="r:") as tar,  # "r:": uncompressed.
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
  if shard.read(0, 8).startswith((_GZIP, _ZSTD, _XZ, _BZ2)):
    return (
      "is compressed: expected a plain tar file, of which any record can be "
      "read without the ones before it. Decompress it."
    )
  return f"cannot be read as a tar file: {error}."
