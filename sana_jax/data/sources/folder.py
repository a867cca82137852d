"""A folder of pictures, at any depth, with .txt and .json files beside them.

`a.jpg` is described by `a.txt` (all of its lines), `a.json` ({"prompt": ...,
"other_caption": ...} or {"a": {name: caption}}), `a_NAME.json` ({"a": {name:
caption}}) and `a_..score.json` ({"a": {name: score}}). A `metadata.jsonl`
({"file_name": ..., "text": ...}, a picture a line) describes the pictures of
its directory, as Hugging Face's image folders have it.
"""

import json
import posixpath
from collections.abc import Mapping, Sequence
from typing import Any

from sana_jax.data import records, storage
from sana_jax.data.sources import access, caption_files, grouping

_TABLE = "metadata.jsonl"
# About the folder as a whole; every picture in it is found without them.
_NOT_CAPTIONS = ("meta_data.json", "dataset_info.json", "dataset_infos.json")


class FolderSource(access.FileSource):
  """Pictures in the order of their names, keyed by path without suffix.

  Args:
    root: the folder.
    names: of its files, if only some of them are meant.

  Raises:
    FileNotFoundError: there is no picture.
    ValueError: a metadata.jsonl is not what it should be.
  """

  def __init__(
    self, root: storage.Location, names: Sequence[str] | None = None
  ):
    names = root.files() if names is None else names
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
    self._table: dict[str, Mapping[str, str]] = {}
    for name in names:
      if posixpath.basename(name) == _TABLE:
        self._table |= _read_table(root, name)
    images = {group.image for group in self._groups}
    lost = [f"{name} in {_TABLE}" for name in self._table if name not in images]
    self.orphans = tuple(orphans + lost)

  def __len__(self) -> int:
    return len(self._groups)

  def keys(self) -> list[str]:
    return [group.key for group in self._groups]

  def file_name(self, index: int) -> str:
    return self._groups[index].image

  def image_head(self, index: int, size: int) -> bytes:
    image = self._root / self._groups[self._checked(index)].image
    return image.read(0, size)

  def _read(self, index: int) -> records.Record:
    group = self._groups[index]
    texts: dict[str, str] = dict(self._table.get(group.image, {}))
    scores: dict[str, float] = {}
    for suffix, name in group.captions:
      value = self._json(name)
      texts |= caption_files.from_json(value, group.stem, suffix)
    for name in group.scores:
      scores |= caption_files.scores_from_json(
        self._json(name), group.stem, str(self._root / name)
      )
    text = None
    if group.text is not None:
      location = self._root / group.text
      text = caption_files.from_text(location.read(), str(location))
    return records.Record(
      key=group.key,
      image=(self._root / group.image).read(),
      captions=caption_files.assemble(texts, scores, text),
    )

  def _json(self, name: str) -> Mapping[str, Any]:
    location = self._root / name
    return caption_files.parse_json(location.read(), str(location))


def _read_table(
  root: storage.Location, name: str
) -> dict[str, Mapping[str, str]]:
  """Returns the captions of a metadata.jsonl by picture."""
  table = {}
  directory = posixpath.dirname(name)
  lines = (root / name).read().decode("utf-8-sig").splitlines()
  for number, line in enumerate(lines, 1):
    if not line.strip():
      continue
    where = f"{root / name}, line {number},"
    fields = caption_files.parse_json(line.encode(), where)
    file_name = fields.get("file_name")
    if not isinstance(file_name, str):
      raise ValueError(
        f"{where} has no file_name, only {json.dumps(sorted(fields))}: "
        "expected the picture that the line is about."
      )
    image = posixpath.normpath(posixpath.join(directory, file_name))
    table[image] = caption_files.from_json(fields, file_name)
  return table
