"""Data sets that TFDS prepared as ArrayRecord, read without TensorFlow.

Captions are the `Text` features whose names say so (see
`caption_files.is_caption_name`), also in lists; of the bundled emoji they are
the name and the keywords.
"""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from sana_jax.data import records, storage
from sana_jax.data.sources import access, array_record, caption_files

_EMOJI = frozenset(("name", "base_name", "keywords", "codepoints"))
_Path = tuple[str, ...]


class TfdsSource(access.FileSource):
  """Records of one split, keyed by split and number.

  Args:
    root: the directory with dataset_info.json.
    split: None: "train", or the only one.

  Raises:
    FileNotFoundError: no data set is there.
    ValueError: it is not local, or lacks the split or pictures.
  """

  def __init__(self, root: storage.Location, split: str | None = None):
    if not root.is_local:
      raise ValueError(
        f"{root} is not on a local disk: TFDS data sets have random access "
        "there only. Copy it, or mount the bucket (gcsfuse)."
      )
    if not (root / "dataset_info.json").is_file():
      raise FileNotFoundError(
        f"No dataset_info.json in {root}: expected the directory of a version "
        "of a TFDS data set, such as name/1.0.0."
      )
    builder = tfds.builder_from_directory(root.path)
    splits = sorted(builder.info.splits)
    if split is None:
      split = splits[0] if len(splits) == 1 else "train"
    if split not in splits:
      raise ValueError(
        f"{root} has no split {split!r}: expected one of {', '.join(splits)}."
      )
    features = builder.info.features
    images = [
      name
      for name, feature in features.items()
      if isinstance(feature, tfds.features.Image)
    ]
    if not images:
      raise ValueError(
        f"{root} has no feature of type Image, only {sorted(features)}."
      )
    self._image = "image" if "image" in images else sorted(images)[0]
    self._captions = _caption_paths(features)
    self._is_emoji = _is_emoji(features)
    self._split = split
    self.name = f"{os.fspath(root.path)}:{split}"
    paths = builder.info.splits[split].filepaths
    self._paths = tuple(map(os.fspath, paths))
    # The contents of the file are wanted, not pixels.
    self._records = builder.as_data_source(
      split, decoders={name: tfds.decode.SkipDecoding() for name in images}
    )

  def __len__(self) -> int:
    return len(self._records)

  def keys(self) -> list[str]:
    return [self._key(index) for index in range(len(self))]

  def files(self) -> list[storage.Location]:
    return [storage.Location.of(path) for path in self._paths]

  def file_name(self, index: int) -> None:
    return None

  def _key(self, index: int) -> str:
    return f"{self._split}/{index}"

  def _read(self, index: int) -> records.Record:
    return self._read_all([index])[0]

  def _read_all(self, indices: Sequence[int]) -> list[records.Record]:
    try:
      fields = self._records.__getitems__(indices)
    except RuntimeError as error:
      raise ValueError(array_record.damage(self.name, error)) from error
    return list(map(self._record, indices, fields))

  def _record(self, index: int, fields: Any) -> records.Record:
    texts = {
      name: _text(_value(fields, path)) for name, path in self._captions.items()
    }
    if self._is_emoji and "keywords" in texts:
      # Keywords of one emoji are one description.
      texts["keywords"] = ", ".join(texts["keywords"])
      texts = {name: text for name, text in texts.items() if text}
    return records.Record(
      key=self._key(index),
      image=bytes(fields[self._image]),
      captions=caption_files.assemble(
        caption_files.from_fields(texts, self.name)
      ),
    )


def _is_emoji(features: Any) -> bool:
  return _EMOJI.issubset(features)


def _caption_paths(features: Any) -> dict[str, _Path]:
  """Returns where captions are in an example, by their names."""
  if _is_emoji(features):
    return {"prompt": ("name",), "keywords": ("keywords",)}
  return {
    ".".join(path): path
    for path in _text_paths(features, ())
    if any(map(caption_files.is_caption_name, path))
  }


def _text_paths(feature: Any, path: _Path) -> Iterator[_Path]:
  if isinstance(feature, tfds.features.FeaturesDict):
    for name, inner in sorted(feature.items()):
      yield from _text_paths(inner, (*path, name))
  elif isinstance(feature, tfds.features.Sequence):
    yield from _text_paths(feature.feature, path)
  elif isinstance(feature, tfds.features.Text):
    yield path


def _value(fields: Any, path: _Path) -> Any:
  for name in path:
    fields = fields[name]
  return fields


def _text(value: Any) -> str | list[str]:
  if isinstance(value, bytes):
    return value.decode()
  if isinstance(value, str):
    return value
  return [_text(item) for item in np.asarray(value, object).ravel()]
