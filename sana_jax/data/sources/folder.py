"""A folder of pictures, at any depth, with .txt and .json files beside them.

`a.jpg` is described by `a.txt` (all of its lines), `a.json` ({"prompt": ...,
"other_caption": ...} or {"a": {name: caption}}), `a_NAME.json` ({"a": {name:
caption}}) and `a_..score.json` ({"a": {name: score}}). A `metadata.jsonl`
({"file_name": ..., "text": ...}, a picture a line) or `metadata.csv` (with such
columns) describes the pictures of its directory, as Hugging Face's image
folders have it. Scores may stand beside captions: {"text_clip_score": 27.5}.
"""

import csv
import io
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsIndex

from sana_jax.data import records, storage
from sana_jax.data.sources import access, caption_files, grouping

_TABLES = ("metadata.jsonl", "metadata.csv")
# About the folder as a whole; every picture in it is found without them.
_NOT_CAPTIONS = ("meta_data.json", "dataset_info.json", "dataset_infos.json")


class FolderSource(access.FileSource):
  """Pictures in the order of their names, keyed by path without suffix.

  Args:
    root: the folder.
    names: of its files, the hidden ones too, if only some of them are meant.

  Raises:
    FileNotFoundError: there is no picture.
    ValueError: a table of metadata is not what it should be.
  """

  def __init__(
    self, root: storage.Location, names: Sequence[str] | None = None
  ):
    everything = root.files() if names is None else names
    names = [name for name in everything if not storage.is_hidden(name)]
    self._root = root
    self.name = str(root)
    self._groups, orphans = grouping.group(
      [n for n in names if posixpath.basename(n) not in _NOT_CAPTIONS]
    )
    if not self._groups:
      raise FileNotFoundError(
        f"No pictures in {root}: expected files that end with "
        f"{', '.join(sorted(grouping.IMAGE_SUFFIXES))}; there are "
        f"{grouping.suffixes(names) or 'no files'}."
      )
    self._table: dict[str, _Described] = {}
    tables = [name for name in names if posixpath.basename(name) in _TABLES]
    self._tables = tuple(tables)
    lost = []
    images = {group.image for group in self._groups}
    for name in tables:
      described = _read_table(root, name)
      self._table |= described
      base = posixpath.basename(name)
      lost += [
        f"{image} in {base}" for image in described if image not in images
      ]
    self.orphans = tuple(orphans + lost)
    self.unread = grouping.unread(everything)
    self.others = tuple(n for n in grouping.others(names) if n not in tables)

  def __len__(self) -> int:
    return len(self._groups)

  def keys(self) -> list[str]:
    return [group.key for group in self._groups]

  def files(self) -> list[storage.Location]:
    names = [
      name
      for group in self._groups
      for name in (
        group.image,
        *([group.text] if group.text is not None else []),
        *(name for _, name in group.captions),
        *group.scores,
      )
    ]
    return [self._root / name for name in [*names, *self._tables]]

  def key(self, index: int) -> str:
    return self._groups[index].key

  def file_name(self, index: int) -> str:
    return self._groups[index].image

  def image_head(self, index: int, size: int) -> bytes:
    image = self._root / self._groups[self._checked(index)].image
    return image.read(0, size)

  def captions(self, index: SupportsIndex) -> tuple[records.Caption, ...]:
    group = self._groups[self._checked(index)]
    of_table = self._table.get(group.image, _Described({}, {}))
    texts, scores = dict(of_table.texts), dict(of_table.scores)
    for suffix, name in group.captions:
      value, where = self._json(name), str(self._root / name)
      texts |= caption_files.from_json(value, group.stem, where, suffix)
      scores |= caption_files.scores_of(value, where)
    for name in group.scores:
      scores |= caption_files.scores_from_json(
        self._json(name), group.stem, str(self._root / name)
      )
    text = None
    if group.text is not None:
      location = self._root / group.text
      text = caption_files.from_text(location.read(), str(location))
    return caption_files.assemble(texts, scores, text)

  def _read(self, index: int) -> records.Record:
    group = self._groups[index]
    return records.Record(
      key=group.key,
      image=(self._root / group.image).read(),
      captions=self.captions(index),
    )

  def _json(self, name: str) -> Mapping[str, Any]:
    location = self._root / name
    return caption_files.parse_json(location.read(), str(location))


class _Described(NamedTuple):
  """Captions of a picture and their scores, by name."""

  texts: Mapping[str, str]
  scores: Mapping[str, float]


def _read_table(root: storage.Location, name: str) -> dict[str, _Described]:
  """Returns what a table of metadata says by picture."""
  table = {}
  directory = posixpath.dirname(name)
  for where, fields in _rows(root / name):
    file_name = fields.get("file_name")
    if not isinstance(file_name, str):
      raise ValueError(
        f"{where} has no file_name, only {json.dumps(sorted(fields))}: "
        "expected the picture that it is about."
      )
    image = posixpath.normpath(posixpath.join(directory, file_name))
    table[image] = _Described(
      caption_files.from_json(fields, file_name, where),
      caption_files.scores_of(fields, where),
    )
  return table


def _rows(
  location: storage.Location,
) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Yields what messages call a row of a table, and its fields."""
  try:
    text = location.read().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(f"{location} is not UTF-8 ({error}).") from error
  if location.name.endswith(".csv"):
    rows = csv.DictReader(io.StringIO(text, newline=""))
    for fields in rows:
      # An empty cell is no value; cells beyond the header's have no name.
      named = {k: v for k, v in fields.items() if k is not None and v}
      yield f"{location}, line {rows.line_num},", named
    return
  for number, line in enumerate(text.splitlines(), 1):
    if line.strip():
      where = f"{location}, line {number},"
      yield where, caption_files.parse_json(line.encode(), where)
