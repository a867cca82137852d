"""ArrayRecord files of our own records: the fastest to read in any order.

Every record of a file is a msgpack map {"key", "image", "captions": [[name,
text, score or nil], ...]}. The last one is
{"format": "sana_jax.records", "version": 1, "keys": [...]}, so that a file
says what it is and its keys are known without reading pictures.
"""

import bisect
import itertools
import os
import threading
from collections.abc import Iterable, Sequence

import msgpack
from array_record.python import array_record_module

from sana_jax.data import records, storage
from sana_jax.data.sources import access

FORMAT = "sana_jax.records"
VERSION = 1
SUFFIX = ".array_record"
# The reader's own buffers and threads help with reading in order only.
_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


def write(path: str | os.PathLike[str], items: Iterable[records.Record]) -> int:
  """Writes a file, there whole or not at all; returns the number of records.

  Raises:
    ValueError: the name does not end with .array_record, a key occurs twice,
      or there are no records.
  """
  path = os.fspath(path)
  if not path.endswith(SUFFIX):
    raise ValueError(f"{path!r} must end with {SUFFIX}, to be found again.")
  temporary = f"{path}.tmp-{os.getpid()}"
  keys: list[str] = []
  # One record a group: each can be read by itself.
  writer = array_record_module.ArrayRecordWriter(temporary, "group_size:1")
  try:
    for record in items:
      keys.append(record.key)
      writer.write(_pack(record))
    if not keys:
      raise ValueError(f"There are no records to write to {path}.")
    access.require_unique(keys, path)
    writer.write(
      msgpack.packb({"format": FORMAT, "version": VERSION, "keys": keys})
    )
    writer.close()
    os.replace(temporary, path)
  except BaseException:
    if writer.is_open():
      writer.close()
    os.unlink(temporary)
    raise
  return len(keys)


def _pack(record: records.Record) -> bytes:
  captions = [[c.name, c.text, c.score] for c in record.captions]
  return msgpack.packb(
    {"key": record.key, "image": record.image, "captions": captions}
  )


class ArrayRecordSource(access.FileSource):
  """The records of files that `write` wrote, in the order of the files.

  Args:
    files: on a local disk; ArrayRecord reads no other.
    name: of the source.

  Raises:
    ValueError: a file is not one of ours, or is not local.
  """

  def __init__(self, files: Sequence[storage.Location], name: str):
    for file in files:
      if not file.is_local:
        raise ValueError(
          f"{file} is not on a local disk: ArrayRecord files have random "
          "access there only. Copy them, or mount the bucket (gcsfuse)."
        )
    self.name = name
    self._paths = [file.path for file in files]
    self._open()
    self._keys = [
      _read_keys(self._reader(i), path) for i, path in enumerate(self._paths)
    ]
    self._ends = list(itertools.accumulate(map(len, self._keys)))
    access.require_unique(self.keys(), name)

  def __len__(self) -> int:
    return self._ends[-1]

  def keys(self) -> list[str]:
    return [key for keys in self._keys for key in keys]

  def files(self) -> list[storage.Location]:
    return [storage.Location.of(path) for path in self._paths]

  def file_name(self, index: int) -> None:
    return None

  def _place(self, index: int) -> tuple[int, int]:
    number = bisect.bisect_right(self._ends, index)
    return number, index - (self._ends[number - 1] if number else 0)

  def _read(self, index: int) -> records.Record:
    return self._read_all([index])[0]

  def _read_all(self, indices: Sequence[int]) -> list[records.Record]:
    places: dict[int, list[tuple[int, int]]] = {}
    for position, index in enumerate(indices):
      number, row = self._place(index)
      places.setdefault(number, []).append((row, position))
    found: dict[int, records.Record] = {}
    for number, rows in places.items():
      contents = self._contents(number, [row for row, _ in rows])
      for (_, position), content in zip(rows, contents, strict=True):
        found[position] = _unpack(content)
    return [found[position] for position in range(len(indices))]

  def _contents(self, number: int, rows: Sequence[int]) -> Sequence[bytes]:
    try:
      return self._reader(number).read(rows)
    except RuntimeError as error:
      raise ValueError(damage(self._paths[number], error)) from error

  def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
    with self._lock:
      if number not in self._readers:
        path = self._paths[number]
        if not os.path.isfile(path):
          raise FileNotFoundError(f"There is no ArrayRecord file {path}.")
        try:
          reader = array_record_module.ArrayRecordReader(path, _OPTIONS)
        except RuntimeError as error:
          raise ValueError(damage(path, error)) from error
        self._readers[number] = reader
      return self._readers[number]

  def _open(self) -> None:
    self._lock = threading.Lock()
    self._readers: dict[int, array_record_module.ArrayRecordReader] = {}

  def __getstate__(self):
    state = self.__dict__.copy()
    del state["_lock"], state["_readers"]
    return state

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()


def damage(path: str, error: RuntimeError) -> str:
  """Returns what to say of a file that its reader cannot make sense of."""
  return (
    f"{path} is damaged ({error}): copy it again, or make it anew from what it "
    "was made from."
  )


def _unpack(content: bytes) -> records.Record:
  fields = msgpack.unpackb(content)
  return records.Record(
    key=fields["key"],
    image=fields["image"],
    captions=tuple(records.Caption(*c) for c in fields["captions"]),
  )


def _read_keys(
  reader: array_record_module.ArrayRecordReader, path: str
) -> list[str]:
  count = reader.num_records() if reader.ok() else 0
  last = None
  if count:
    try:
      last = msgpack.unpackb(reader.read([count - 1])[0])
    except ValueError:  # Records of another kind.
      last = None
    except RuntimeError as error:
      raise ValueError(damage(path, error)) from error
  if not isinstance(last, dict) or last.get("format") != FORMAT:
    raise ValueError(
      f"{path} does not end with an index of {FORMAT}: expected a file that "
      "sana_jax.data.sources.array_record.write wrote, whole; for a TFDS data "
      "set, pass the directory with its dataset_info.json."
    )
  if last["version"] != VERSION:
    raise ValueError(
      f"{path} has version {last['version']} of {FORMAT}, this is {VERSION}."
    )
  return last["keys"]
