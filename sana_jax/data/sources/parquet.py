"""Parquet tables of pictures, as Hugging Face's data sets have them.

Column `image` (or `jpg`, `png`, `webp`) holds {bytes, path} or bytes, or
`image_path` names a file relative to the table's. Columns whose names say so
(see `caption_files.is_caption_name`) hold captions, strings or lists of them;
NAME_clip_score or clip_score hold their scores (see `caption_files.scores_of`).
The keys are those of a column `key` or `__key__`, else the table's name and
the number of the row.

A picture is read with its whole row group: large ones make random order slow.
"""

import collections
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sana_jax.data import records, storage
from sana_jax.data.sources import access, caption_files, grouping

_IMAGES = ("image", "jpg", "png", "webp", "image_path")
_KEYS = ("key", "__key__")
# Row groups that are kept: neighbours of a record are often read next.
_KEPT = 2


class ParquetSource(access.FileSource):
  """Rows of Parquet files, in the order of the files.

  Args:
    files: tables with the same columns.
    name: of the source.

  Raises:
    ValueError: a file is not Parquet, or its columns are not as expected.
  """

  def __init__(self, files: Sequence[storage.Location], name: str):
    self.name = name
    self._files = tuple(files)
    self._groups: list[tuple[int, int]] = []  # File, number in the file.
    starts, self._file_starts = [0], [0]
    for number, file in enumerate(self._files):
      metadata, schema = _metadata(file)
      if number == 0:
        found = _columns(schema, file)
        self._image, self._captions, self._scores, self._key = found
      self._require_columns(schema, file)
      for i in range(metadata.num_row_groups):
        self._groups.append((number, i))
        starts.append(starts[-1] + metadata.row_group(i).num_rows)
      self._file_starts.append(starts[-1])
    self._starts = np.array(starts)
    self._open()

  def __len__(self) -> int:
    return int(self._starts[-1])

  def keys(self) -> list[str]:
    if self._key is None:
      keys = [self._row_key(index) for index in range(len(self))]
    else:
      columns = (_read(file, None, [self._key]) for file in self._files)
      keys = [str(k) for c in columns for k in c[self._key].to_pylist()]
    access.require_unique(keys, self.name)
    return keys

  def files(self) -> list[storage.Location]:
    """Returns the tables, not the pictures that they may name."""
    return list(self._files)

  def file_name(self, index: int) -> str | None:
    value = self._row(index)[self._image]
    if isinstance(value, Mapping):
      return value.get("path")
    return value if isinstance(value, str) else None

  def _read(self, index: int) -> records.Record:
    fields = self._row(index)
    texts = {name: fields[name] for name in self._captions}
    scores = {name: fields[name] for name in self._scores}
    where = f"Row {index} of {self.name}"
    return records.Record(
      key=self._row_key(index) if self._key is None else str(fields[self._key]),
      image=self._bytes(fields[self._image], index),
      captions=caption_files.assemble(
        caption_files.from_fields(texts, where),
        caption_files.scores_of(texts | scores, where),
      ),
    )

  def _read_all(self, indices: Sequence[int]) -> list[records.Record]:
    # By row group: none is read twice.
    order = sorted(range(len(indices)), key=lambda i: indices[i])
    found = {i: self._read(indices[i]) for i in order}
    return [found[i] for i in range(len(indices))]

  def _bytes(self, value: Any, index: int) -> bytes:
    if isinstance(value, Mapping):
      content, path = value.get("bytes"), value.get("path")
    else:
      content, path = value, None
    if isinstance(content, bytes):
      return content
    path = path or content
    if not path:
      raise ValueError(
        f"Row {index} of {self.name} has neither bytes nor a path in its "
        f"column {self._image!r}."
      )
    return (self._files[self._file_of(index)].parent() / path).read()

  def _file_of(self, index: int) -> int:
    return int(np.searchsorted(self._file_starts, index, "right")) - 1

  def _row_key(self, index: int) -> str:
    number = self._file_of(index)
    stem = grouping.split_suffix(self._files[number].name)[0]
    return f"{stem}/{index - self._file_starts[number]}"

  def _row(self, index: int) -> dict[str, Any]:
    group = int(np.searchsorted(self._starts, index, "right")) - 1
    row = index - int(self._starts[group])
    return self._table(group).slice(row, 1).to_pylist()[0]

  def _table(self, group: int) -> pa.Table:
    with self._lock:
      if group in self._cached:
        self._cached.move_to_end(group)
        return self._cached[group]
    file, number = self._groups[group]
    columns = [self._image, *self._captions, *self._scores]
    columns += [self._key] if self._key else []
    table = _read(self._files[file], number, columns)
    with self._lock:
      self._cached[group] = table
      while len(self._cached) > _KEPT:
        self._cached.popitem(last=False)
    return table

  def _require_columns(self, schema: pa.Schema, file: storage.Location):
    wanted = {self._image, *self._captions, *self._scores} | (
      {self._key} if self._key else set()
    )
    if lacking := wanted - set(schema.names):
      raise ValueError(
        f"{file} has no columns {sorted(lacking)}, as {self._files[0]} has: "
        f"expected tables that are alike, got {schema.names}."
      )

  def _open(self) -> None:
    self._lock = threading.Lock()
    self._cached = collections.OrderedDict[int, pa.Table]()

  def __getstate__(self):
    state = self.__dict__.copy()
    del state["_lock"], state["_cached"]
    return state

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()


def _metadata(file: storage.Location) -> tuple[pq.FileMetaData, pa.Schema]:
  try:
    with file.open() as opened:
      parquet = pq.ParquetFile(opened)
      return parquet.metadata, parquet.schema_arrow
  except pa.ArrowInvalid as error:
    raise ValueError(f"{file} is not a Parquet file: {error}") from error


def _read(
  file: storage.Location, group: int | None, columns: list[str]
) -> pa.Table:
  with file.open() as opened:
    parquet = pq.ParquetFile(opened)
    if group is None:
      return parquet.read(columns=columns)
    return parquet.read_row_group(group, columns=columns)


def _columns(
  schema: pa.Schema, file: storage.Location
) -> tuple[str, list[str], list[str], str | None]:
  """Returns the columns of pictures, captions, scores and keys."""
  images = [name for name in _IMAGES if name in schema.names]
  if not images:
    raise ValueError(
      f"{file} has no column of pictures ({', '.join(_IMAGES)}), only "
      f"{schema.names}."
    )
  captions = [
    name
    for name in schema.names
    if caption_files.is_caption_name(name) and _is_text(schema.field(name).type)
  ]
  scores = [
    name for name in schema.names if caption_files.is_score_name(name, captions)
  ]
  keys = [name for name in _KEYS if name in schema.names]
  return images[0], captions, scores, keys[0] if keys else None


def _is_text(kind: pa.DataType) -> bool:
  if pa.types.is_list(kind) or pa.types.is_large_list(kind):
    kind = kind.value_type
  return pa.types.is_string(kind) or pa.types.is_large_string(kind)
