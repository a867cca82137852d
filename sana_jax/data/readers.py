"""What is planned, read: arrays of pictures, or of what a cache holds."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Shaped, UInt8

from sana_jax.data import (
  buckets,
  cache_records,
  captions,
  loader,
  records,
  sampler,
  transforms,
)
from sana_jax.data import cache as cache_lib

TokenizeFn = Callable[[Sequence[str]], loader.Batch]


@dataclasses.dataclass(frozen=True)
class PictureReader:
  """Decodes pictures, fits them to their shape, and draws their captions.

  Its batches are {"images": uint8 [b, h, w, 3], and what `tokenize` makes of
  the captions}.

  Attributes:
    shapes: (height, width) of every bucket.
    tokenize: from captions to arrays, one row each.
    crop: see `transforms.fit`, as `flip` and `resample`.
  """

  sources: Sequence[records.Source]
  shapes: Sequence[buckets.Shape]
  selection: captions.CaptionSelection
  tokenize: TokenizeFn
  crop: str = "center"
  flip: bool = False
  resample: str = "bicubic"

  def __call__(self, plan: sampler.BatchPlan) -> loader.Batch:
    images, texts = [], []
    found = loader.read_records(self.sources, plan)
    for row, record in enumerate(found):
      rng = np.random.default_rng(int(plan.draw[row]))
      # The caption is drawn first, as for a cache: both draw the same.
      texts.append(captions.choose(record.captions, rng, self.selection))
      source = self.sources[plan.source[row]]
      images.append(self._fit(source.name, record, plan.bucket, rng))
    return {"images": np.stack(images), **self.tokenize(texts)}

  def _fit(
    self,
    name: str,
    record: records.Record,
    bucket: int,
    rng: np.random.Generator,
  ) -> UInt8[np.ndarray, "h w 3"]:
    try:
      return transforms.fit(
        transforms.decode(record.image),
        *self.shapes[bucket],
        crop=self.crop,
        flip=self.flip,
        rng=rng,
        resample=self.resample,
      )
    except ValueError as error:
      raise ValueError(
        f"{name}, {record.key}: {error} Remove the picture, or set "
        "data.verify=True to find all such pictures first and leave them out."
      ) from error


@dataclasses.dataclass(frozen=True)
class CacheReader:
  """Reads latents and the text states of a drawn caption.

  Its batches are {"latents": [b, h, w, c], "text": [b, l, d], both bfloat16,
  "text_mask": bool [b, l]}. A record without captions has the empty one.
  """

  source: cache_lib.CachedSource
  selection: captions.CaptionSelection

  def __call__(self, plan: sampler.BatchPlan) -> loader.Batch:
    found = loader.read_records([self.source], plan)
    null = self.source.null_caption()
    text = np.zeros((len(found), *null.shape), null.dtype)
    mask = np.zeros(text.shape[:2], bool)
    for row, record in enumerate(found):
      rng = np.random.default_rng(int(plan.draw[row]))
      states = self._draw(record, rng)
      states = null[:1] if states is None else states
      text[row, : len(states)] = states
      mask[row, : len(states)] = True
    latents = np.stack([record.latents for record in found])
    return {"latents": latents, "text": text, "text_mask": mask}

  def _draw(
    self, record: cache_records.Record, rng: np.random.Generator
  ) -> Shaped[np.ndarray, "length d"] | None:
    plain = [records.Caption(c.name, c.text, c.score) for c in record.captions]
    chosen = captions.choose(plain, rng, self.selection)
    return next((c.states for c in record.captions if c.text == chosen), None)


def null_mask(length: int) -> Bool[np.ndarray, "1 {length}"]:
  """The mask of the empty caption, which is one token: `<bos>`."""
  return (np.arange(length) < 1)[None]
