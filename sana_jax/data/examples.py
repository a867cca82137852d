"""Training examples: endless Grain datasets, random access by position.

Position i of a dataset is a pure function of (seed, i): shuffling is reseeded
every epoch and captions are drawn by position, so a step's batch never depends
on how the run got there.
"""

from collections.abc import Callable
from typing import Any

import grain
import numpy as np
from jaxtyping import Float, UInt8

from sana_jax import config as config_lib
from sana_jax.data import emoji


def to_unit_range(
  image: UInt8[np.ndarray, "h w 3"],
) -> Float[np.ndarray, "h w 3"]:
  """Maps 0..255 to [-1, 1]."""
  return image.astype(np.float32) / 127.5 - 1.0


def load_source(config: config_lib.DataConfig) -> emoji.EmojiSource:
  """Opens the records and checks their size.

  Raises:
    ValueError: the images are not `config.image_size` pixels wide and high.
  """
  source = emoji.load(config.split, config.data_dir)
  height, width = source[0]["image"].shape[:2]
  if (height, width) != (config.image_size, config.image_size):
    raise ValueError(
      f"data.image_size is {config.image_size}, but the images are "
      f"{height}x{width}. Set data.image_size, or build the data set at that "
      f"size."
    )
  return source


def image_examples(
  config: config_lib.DataConfig, seed: int
) -> grain.MapDataset:
  """Examples {"images": float32 [h, w, 3] in [-1, 1]}."""
  return (
    grain.MapDataset.source(load_source(config))
    .seed(seed)
    .shuffle()
    .repeat()
    .map(lambda record: {"images": to_unit_range(record["image"])})
  )


def caption_examples(
  config: config_lib.DataConfig,
  seed: int,
  latents: Float[np.ndarray, "n h w c"],
  tokenize: Callable[[str], dict[str, np.ndarray]],
) -> grain.MapDataset:
  """Examples {"latents", and what `tokenize` makes of a drawn caption}.

  Args:
    latents: one for every record of the source, in its order.
    tokenize: from a caption to arrays of fixed shapes.
  """

  def example(item: dict[str, Any], rng: np.random.Generator):
    caption = emoji.sample_caption(
      item["record"],
      rng,
      config.keyword_probability,
      config.keywords_only_probability,
    )
    return {"latents": item["latents"], **tokenize(caption)}

  return (
    grain.MapDataset.source(_Zipped(load_source(config), latents))
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(example)
  )


def names(config: config_lib.DataConfig, seed: int) -> grain.MapDataset:
  """Names the records of the examples, in the same order."""
  source = load_source(config)
  found = [source[i]["name"] for i in range(len(source))]
  return grain.MapDataset.source(found).seed(seed).shuffle().repeat()


class _Zipped:
  """Records with their latents; records are decoded once and kept."""

  def __init__(
    self, records: emoji.EmojiSource, latents: Float[np.ndarray, "n h w c"]
  ):
    self._records = [records[i] for i in range(len(records))]
    self._latents = latents

  def __len__(self) -> int:
    return len(self._records)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return {"record": self._records[index], "latents": self._latents[index]}
