"""JSON files about whole tar files: captions and scores by key.

`00000.tar` is described by `00000.json` and `00000_NAME.json`, each {key:
{caption name: text}}, and by `00000_..score.json`, {key: {caption name:
score}}. An inner "prompt" of `00000_NAME.json` is called `_NAME`, as the
reference calls it.
"""

import collections
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from sana_jax.data import storage
from sana_jax.data.sources import caption_files, grouping

# Parsed files that are kept: random access meets the same shards again.
_KEPT = 32


class Sidecars:
  """Captions and scores that lie beside tar files.

  Args:
    files: for every shard, pairs of a suffix and a file.
  """

  def __init__(self, files: Sequence[Sequence[tuple[str, storage.Location]]]):
    self._files = tuple(map(tuple, files))
    self._parsed: collections.OrderedDict[str, Mapping[str, Any]]
    self._open()

  @classmethod
  def beside(cls, shards: Sequence[storage.Location]) -> "Sidecars":
    """Looks for the files in the directories of the shards."""
    listings: dict[str, list[storage.Location]] = {}
    files = []
    for shard in shards:
      directory = shard.parent()
      if directory.path not in listings:
        listings[directory.path] = [
          location
          for location in directory.children()
          if location.name.endswith(".json")
        ]
      stem = grouping.split_suffix(shard.name)[0]
      files.append(
        [
          (rest, location)
          for location in listings[directory.path]
          if location.name.startswith(stem)
          and _is_suffix(rest := location.name[len(stem) : -len(".json")])
        ]
      )
    return cls(files)

  def files(self) -> list[storage.Location]:
    """Returns the files of all shards, each once."""
    found = {at.path: at for files in self._files for _, at in files}
    return list(found.values())

  def find(
    self, shard: int, key: str, stem: str
  ) -> tuple[dict[str, str], dict[str, float]]:
    """Returns captions and scores of a record by caption name.

    Raises:
      ValueError: a file is not what it should be.
    """
    texts: dict[str, str] = {}
    scores: dict[str, float] = {}
    for suffix, location in self._files[shard]:
      table = self._table(location)
      found = key if key in table else stem
      if found not in table:
        continue
      if not isinstance(table[found], Mapping):
        raise ValueError(
          f"{location} describes {found!r} by a JSON "
          f"{type(table[found]).__name__}: expected an object of captions, or "
          "scores, by name."
        )
      if grouping.is_score_file(location.name):
        scores |= caption_files.scores_from_json(table, found, str(location))
      else:
        texts |= caption_files.from_json(table, found, str(location), suffix)
    return texts, scores

  def _table(self, location: storage.Location) -> Mapping[str, Any]:
    with self._lock:
      if location.path in self._parsed:
        self._parsed.move_to_end(location.path)
        return self._parsed[location.path]
    table = caption_files.parse_json(location.read(), str(location))
    with self._lock:
      self._parsed[location.path] = table
      while len(self._parsed) > _KEPT:
        self._parsed.popitem(last=False)
    return table

  def _open(self) -> None:
    self._lock = threading.Lock()
    self._parsed = collections.OrderedDict()

  def __getstate__(self):
    return self._files

  def __setstate__(self, state):
    self._files = state
    self._open()


def _is_suffix(rest: str) -> bool:
  return not rest or rest.startswith(("_", "."))
