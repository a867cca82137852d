"""The emoji data set that ships with the package, read without TensorFlow.

3655 pictures of 64x64 pixels with their Unicode names and English keywords:
small enough to sit in the repository, real enough to learn composition from.
The split `heldout` holds 80 combinations of occupation, gender and skin tone
whose parts all occur in `train` in other combinations.
"""

import importlib.resources
import io
import operator
import os
import pathlib
from typing import SupportsIndex, TypedDict

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import UInt8
from PIL import Image

MAX_CAPTION_KEYWORDS = 3


class Record(TypedDict):
  """One emoji.

  Attributes:
    image: RGB on white.
    name: CLDR short name, e.g. `woman firefighter: dark skin tone`.
    base_name: `name` of the same emoji without skin tones. Two records share a
      base name exactly when they differ in skin tone alone; gender, hair and
      flags are part of it (`woman firefighter`, `woman: red hair`,
      `flag: France`).
    keywords: English keywords of `base_name`, without `base_name` itself; may
      be empty.
    group: CLDR group, e.g. `People & Body`.
    subgroup: CLDR subgroup, e.g. `person-role`.
    codepoints: Hexadecimal, separated by spaces.
  """

  image: UInt8[np.ndarray, "64 64 3"]
  name: str
  base_name: str
  keywords: tuple[str, ...]
  group: str
  subgroup: str
  codepoints: str


class EmojiSource:
  """Random access to the records of one split, in CLDR order."""

  def __init__(self, split: str, data_dir: str | os.PathLike[str]):
    if not (pathlib.Path(data_dir) / "dataset_info.json").is_file():
      raise FileNotFoundError(
        f"no emoji data set in {os.fspath(data_dir)!r}: expected a directory"
        " with dataset_info.json, as python -m sana_jax.data.emoji_build"
        " writes it"
      )
    builder = tfds.builder_from_directory(data_dir)
    if split not in builder.info.splits:
      raise ValueError(
        f"unknown split {split!r}: expected one of"
        f" {', '.join(sorted(builder.info.splits))}"
      )
    # TFDS would decode with OpenCV, or warn that it is missing.
    self._source = builder.as_data_source(
      split, decoders={"image": tfds.decode.SkipDecoding()}
    )

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: SupportsIndex) -> Record:
    index = operator.index(index)
    if not -len(self) <= index < len(self):
      raise IndexError(f"index {index} is outside {len(self)} emoji")
    fields = self._source[index % len(self)]
    with Image.open(io.BytesIO(fields["image"])) as picture:
      image = np.array(picture.convert("RGB"))
    return Record(
      image=image,
      name=fields["name"].decode(),
      base_name=fields["base_name"].decode(),
      keywords=tuple(keyword.decode() for keyword in fields["keywords"]),
      group=fields["group"].decode(),
      subgroup=fields["subgroup"].decode(),
      codepoints=fields["codepoints"].decode(),
    )


def load(
  split: str, data_dir: str | os.PathLike[str] | None = None
) -> EmojiSource:
  """Opens `train` or `heldout`; by default of the set that ships."""
  if data_dir is None:
    data_dir = str(importlib.resources.files("sana_jax.assets") / "emoji_64")
  return EmojiSource(split, data_dir)


def sample_caption(
  record: Record,
  rng: np.random.Generator,
  keyword_probability: float,
  keywords_only_probability: float,
) -> str:
  """Draws a caption: the name, the name with keywords, or keywords alone.

  One to three keywords are drawn without replacement. A record without
  keywords is always captioned by its name.

  Args:
    record: The emoji.
    rng: Advanced by the call; equal states give equal captions.
    keyword_probability: Of `name, keyword, ...`.
    keywords_only_probability: Of `keyword, ...`. What the two leave is the
      probability of the name alone.

  Raises:
    ValueError: The probabilities are negative or sum to more than one.
  """
  if (
    min(keyword_probability, keywords_only_probability) < 0
    or keyword_probability + keywords_only_probability > 1
  ):
    raise ValueError(
      "keyword_probability and keywords_only_probability must be at least 0"
      f" and sum to at most 1, got {keyword_probability} and"
      f" {keywords_only_probability}"
    )
  draw = rng.random()
  keywords = record["keywords"]
  with_keywords = draw < keyword_probability + keywords_only_probability
  if not keywords or not with_keywords:
    return record["name"]
  count = rng.integers(min(MAX_CAPTION_KEYWORDS, len(keywords))) + 1
  chosen = [
    keywords[i] for i in rng.choice(len(keywords), size=count, replace=False)
  ]
  if draw >= keywords_only_probability:
    chosen.insert(0, record["name"])
  return ", ".join(chosen)
