"""A small source of pictures, some of which are broken."""

import io

import numpy as np
import PIL.Image

from sana_jax.data import buckets, records
from tests import tiny

SHAPES = ((40, 40), (30, 50), (80, 40), (33, 37))


def png(rng, height: int, width: int) -> bytes:
  """Draws a smooth random picture."""
  coarse = rng.integers(0, 256, (3, 4, 3), np.uint8)
  image = PIL.Image.fromarray(coarse).resize((width, height))
  buffer = io.BytesIO()
  image.save(buffer, "PNG")
  return buffer.getvalue()


class Pictures:
  """Records in memory.

  Args:
    broken: numbers of the pictures whose end is cut off.
  """

  name = "pictures"

  def __init__(self, count: int, broken=(), seed: int = 0):
    rng = np.random.default_rng(seed)
    self.records = []
    for index in range(count):
      image = png(rng, *SHAPES[index % len(SHAPES)])
      captions = tuple(
        records.Caption(name, f"{tiny.CAPTIONS[index % 3]} {index % 5}", score)
        for name, score in (("prompt", None), ("vila", 27.5))[: index % 3]
      )
      if index in broken:
        image = image[: len(image) // 2]
      self.records.append(records.Record(f"p{index:03d}", image, captions))

  def __len__(self) -> int:
    return len(self.records)

  def __getitem__(self, index) -> records.Record:
    return self.records[index]

  def __getitems__(self, indices) -> list[records.Record]:
    return [self.records[index] for index in indices]

  def sizes(self, problems=None) -> buckets.Sizes:
    shapes = np.array([SHAPES[i % len(SHAPES)] for i in range(len(self))])
    return buckets.Sizes(self.name, shapes[:, 0], shapes[:, 1], problems or {})
