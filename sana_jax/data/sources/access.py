"""What our sources have in common beyond `records.Source`."""

import abc
import collections
import operator
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import SupportsIndex

from sana_jax.data import records, storage


class FileSource(abc.ABC):
  """Random access to records in files, by index or one after another.

  Holds nothing open: it may be pickled and shared between threads.

  Attributes:
    name: the path it was opened from.
    orphans: files that describe no picture, such as a .txt without one.
    unread: pictures that are left out, and of what kind they are: a suffix
      that is not read, or "hidden".
    others: files that are neither pictures nor about any.
  """

  name: str
  orphans: tuple[str, ...] = ()
  unread: Mapping[str, str] = types.MappingProxyType({})
  others: tuple[str, ...] = ()

  @abc.abstractmethod
  def keys(self) -> Sequence[str]:
    """Returns all keys in order, without reading pictures."""

  @abc.abstractmethod
  def file_name(self, index: int) -> str | None:
    """Returns what the picture's file is called, if it has a name."""

  @abc.abstractmethod
  def files(self) -> Sequence[storage.Location]:
    """Returns the files that records are read from, without opening them."""

  def key(self, index: int) -> str:
    """Returns one key, of a record that cannot be read too."""
    return self.keys()[index]

  def captions(self, index: SupportsIndex) -> tuple[records.Caption, ...]:
    """Reads a record's captions, without its picture where that is easy."""
    return self[index].captions

  @abc.abstractmethod
  def _read(self, index: int) -> records.Record:
    """Reads the record of an index that is known to exist."""

  @abc.abstractmethod
  def __len__(self) -> int: ...

  def __getitem__(self, index: SupportsIndex) -> records.Record:
    return self._read(self._checked(index))

  def __getitems__(self, indices: Sequence[int]) -> list[records.Record]:
    """Reads several records, in one go where the format allows."""
    return self._read_all([self._checked(index) for index in indices])

  def __iter__(self) -> Iterator[records.Record]:
    return (self[index] for index in range(len(self)))

  def __repr__(self) -> str:
    return f"{type(self).__name__}({self.name!r}, {len(self)} records)"

  def image_head(self, index: SupportsIndex, size: int) -> bytes:
    """Reads the first bytes of a picture's file, more where that is easier."""
    del size  # Formats without files have nothing to gain.
    return self[index].image

  def _read_all(self, indices: Sequence[int]) -> list[records.Record]:
    return [self._read(index) for index in indices]

  def _checked(self, index: SupportsIndex) -> int:
    index = operator.index(index)
    if not -len(self) <= index < len(self):
      raise IndexError(
        f"index {index} is outside the {len(self)} records of {self.name}"
      )
    return index % len(self)


def describe_unread(source: records.Source) -> str | None:
  """Says how many pictures are left out, and of what kinds; None: none are."""
  if not isinstance(source, FileSource) or not source.unread:
    return None
  kinds = collections.Counter(source.unread.values())
  first = {kind: name for name, kind in reversed(source.unread.items())}
  shown = [
    f"{count} {kind} (such as {first[kind]})"
    for kind, count in sorted(kinds.items())
  ]
  return (
    f"{source.name}: {len(source.unread)} pictures are not read: "
    f"{', '.join(shown)}"
  )


def key_of(source: records.Source, index: int) -> str:
  """Returns the key of a record, which need not be readable."""
  if isinstance(source, FileSource):
    return source.key(index)
  try:
    return source[index].key
  except (OSError, ValueError):
    return f"record {index}"


def require_unique(keys: Sequence[str], name: str) -> None:
  """Raises ValueError when keys do not tell records apart."""
  if len(set(keys)) == len(keys):
    return
  seen, repeated = set(), []
  for key in keys:
    if key in seen:
      repeated.append(key)
    seen.add(key)
  raise ValueError(
    f"{name} has {len(repeated)} keys more than once, such as {repeated[:3]}: "
    "expected a key to name one record."
  )
