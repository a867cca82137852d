"""What is planned, read: arrays of pictures, or of what a cache holds."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, UInt8

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

_ADVICE = (
  "Mend it, or set data.verify=True to find all that is broken first and leave "
  "it out."
)


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
    for row, record in enumerate(self._read(plan)):
      rng = np.random.default_rng(int(plan.draw[row]))
      # The caption is drawn first, as for a cache: both draw the same.
      texts.append(captions.choose(record.captions, rng, self.selection))
      source = self.sources[plan.source[row]]
      images.append(self._fit(source.name, record, plan.bucket, rng))
    return {"images": np.stack(images), **self.tokenize(texts)}

  def _read(self, plan: sampler.BatchPlan) -> list[records.Record]:
    try:
      return loader.read_records(self.sources, plan)
    except ValueError as error:
      # Such as a caption that is no text; the message names the file.
      raise ValueError(f"{error} {_ADVICE}") from error

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
      raise ValueError(f"{name}, {record.key}: {error} {_ADVICE}") from error


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
      chosen = _draw(record, plan.draw[row], self.selection)
      states = next(
        (c.states for c in record.captions if c.text == chosen), null[:1]
      )
      text[row, : len(states)] = states
      mask[row, : len(states)] = True
    return {**_latents(found), "text": text, "text_mask": mask}


@dataclasses.dataclass(frozen=True)
class LatentReader:
  """Reads latents, and the tokens of a drawn caption.

  Its batches are {"latents": bfloat16 [b, h, w, c], and what `tokenize` makes
  of the captions}.
  """

  source: cache_lib.CachedSource
  selection: captions.CaptionSelection
  tokenize: TokenizeFn

  def __call__(self, plan: sampler.BatchPlan) -> loader.Batch:
    found = loader.read_records([self.source], plan)
    texts = [
      _draw(record, draw, self.selection)
      for record, draw in zip(found, plan.draw, strict=True)
    ]
    return {**_latents(found), **self.tokenize(texts)}


def _latents(found: Sequence[cache_records.Record]) -> loader.Batch:
  return {"latents": np.stack([record.latents for record in found])}


def _draw(
  record: cache_records.Record,
  draw: np.integer,
  selection: captions.CaptionSelection,
) -> str:
  """Draws a caption as it is drawn of the picture."""
  plain = [records.Caption(c.name, c.text, c.score) for c in record.captions]
  rng = np.random.default_rng(int(draw))
  return captions.choose(plain, rng, selection)


def null_mask(length: int) -> Bool[np.ndarray, "1 {length}"]:
  """The mask of the empty caption, which is one token: `<bos>`."""
  return (np.arange(length) < 1)[None]
