"""Where images go: PNG files, WebDataset shards, or ArrayRecord shards.

The same images make the same bytes: shards hold no times, users or hosts. A
sample of a shard has two parts, the PNG and a JSON text that describes it:

- WebDataset: a tar file with `00000012.png` and `00000012.json` for image 12.
- ArrayRecord: MessagePack maps {"__key__": "00000012", "png": bytes, "json":
  bytes}; `msgpack.unpackb` of a record read by `array_record` or Grain's
  `ArrayRecordDataSource` gives them back.
"""

import abc
import contextlib
import io
import pathlib
import re
import tarfile
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgpack

from sana_jax import storage

_SLUG_LENGTH = 60
# Of the 255 that file systems allow; a letter may take four.
_SLUG_BYTES = 180


class Sample(NamedTuple):
  """A finished image.

  Attributes:
    description: JSON; the PNG carries it too.
  """

  index: int
  prompt: str
  png: bytes
  description: bytes


class Stored(NamedTuple):
  """Where a sample is: a file of so many bytes, and its key if a shard."""

  file: str
  key: str | None
  bytes: int


class UnitWriter(abc.ABC):
  """Writes the samples of one unit; finished or discarded as a whole."""

  @abc.abstractmethod
  def add(self, sample: Sample) -> None:
    """Takes a sample.

    Raises:
      OSError: it cannot be written.
    """

  @abc.abstractmethod
  def finish(self) -> list[Stored]:
    """Completes the files and returns where each sample is.

    Raises:
      OSError: they cannot be written.
    """

  @abc.abstractmethod
  def discard(self) -> None:
    """Removes what is not finished."""


# Makes the writer of unit `number`.
Sink = Callable[[int], UnitWriter]


class PngWriter(UnitWriter):
  """One PNG file an image, named by number and prompt."""

  def __init__(self, directory: storage.Directory, num_images: int):
    self._directory = directory
    self._num_images = num_images
    self._stored: list[Stored] = []

  def add(self, sample: Sample) -> None:
    name = png_name(sample.index, sample.prompt, self._num_images)
    self._directory.write(name, sample.png)
    self._stored.append(Stored(name, None, len(sample.png)))

  def finish(self) -> list[Stored]:
    self._directory.sync()
    return self._stored

  def discard(self) -> None:
    """Nothing to do: each file is complete."""


class ShardWriter(UnitWriter):
  """All samples in one file."""

  def __init__(self, directory: storage.Directory, name: str):
    self._directory = directory
    self._name = name
    self._keys: list[str] = []
    self._path = directory.temporary(name)
    with self._removing_on_error():
      self._open(self._path)

  def add(self, sample: Sample) -> None:
    key = f"{sample.index:08d}"
    with self._removing_on_error():
      self._write(key, sample)
    self._keys.append(key)

  def finish(self) -> list[Stored]:
    with self._removing_on_error():
      self._close()
      size = self._path.stat().st_size
      if not self._keys:
        self._path.unlink()
        return []
      self._directory.publish(self._name)
    self._directory.sync()
    return [Stored(self._name, key, size) for key in self._keys]

  def discard(self) -> None:
    self._path.unlink(missing_ok=True)

  def _removing_on_error(self) -> contextlib.AbstractContextManager[None]:
    return storage.removing_on_error(
      self._path, self._directory.path / self._name
    )

  @abc.abstractmethod
  def _open(self, path: pathlib.Path) -> None: ...

  @abc.abstractmethod
  def _write(self, key: str, sample: Sample) -> None: ...

  @abc.abstractmethod
  def _close(self) -> None: ...


class WebDatasetWriter(ShardWriter):
  def _open(self, path: pathlib.Path) -> None:
    self._tar = tarfile.TarFile(path, "w", format=tarfile.USTAR_FORMAT)

  def _write(self, key: str, sample: Sample) -> None:
    self._add_member(f"{key}.png", sample.png)
    self._add_member(f"{key}.json", sample.description)

  def _close(self) -> None:
    self._tar.close()

  def _add_member(self, name: str, content: bytes) -> None:
    # A TarInfo has time 0, and no user, unless told otherwise.
    member = tarfile.TarInfo(name)
    member.size = len(content)
    self._tar.addfile(member, io.BytesIO(content))


class ArrayRecordWriter(ShardWriter):
  def _open(self, path: pathlib.Path) -> None:
    self._records = storage.RecordFile(path, self._directory.path / self._name)

  def _write(self, key: str, sample: Sample) -> None:
    record = {
      "__key__": key,
      "png": sample.png,
      "json": sample.description,
    }
    self._records.write(msgpack.packb(record))

  def _close(self) -> None:
    self._records.close()


_SHARDS = {
  "webdataset": (WebDatasetWriter, "tar"),
  "arrayrecord": (ArrayRecordWriter, "array_record"),
}
FORMATS: Sequence[str] = ("png", *_SHARDS)


def make_sink(
  output_format: str,
  directory: storage.Directory,
  *,
  num_images: int,
  unit_name: Callable[[int], str],
) -> Sink:
  """Returns what makes writers in one of FORMATS.

  Args:
    unit_name: names the shard of a unit, without its ending.
  """
  if output_format == "png":
    return lambda number: PngWriter(directory, num_images)
  writer, suffix = _SHARDS[output_format]
  return lambda number: writer(directory, f"{unit_name(number)}.{suffix}")


def png_name(index: int, prompt: str, num_images: int) -> str:
  """Names a file so that names sort like numbers: 0003-a-red-apple.png."""
  width = max(4, len(str(num_images - 1)))
  return f"{index:0{width}d}-{slug(prompt)}.png"


def slug(prompt: str) -> str:
  """Makes a prompt a file name: lower case letters and digits, hyphens."""
  words = re.findall(r"[^\W_]+", prompt.lower())
  short = "-".join(words)[:_SLUG_LENGTH].encode()[:_SLUG_BYTES]
  return short.decode(errors="ignore").strip("-") or "image"
