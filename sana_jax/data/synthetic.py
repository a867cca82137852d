"""Batches of noise, shaped like those of a cache: nothing is read for them."""

import dataclasses

import numpy as np
from jaxtyping import BFloat16

from sana_jax.data import cache_records, loader, sampler

# Rows that are drawn once; batches are taken from them, so that making one
# costs a copy and no random numbers.
_ROWS = 64


@dataclasses.dataclass(frozen=True)
class NoiseReader:
  """Takes rows of noise, and cuts their texts to random lengths.

  Its batches are those of `readers.CacheReader`.
  """

  latents: BFloat16[np.ndarray, "n h w c"]
  text: BFloat16[np.ndarray, "n l d"]

  def __call__(self, plan: sampler.BatchPlan) -> loader.Batch:
    length = self.text.shape[1]
    lengths = 1 + plan.draw.astype(np.uint64) % np.uint64(length)
    return {
      "latents": self.latents[plan.index],
      "text": self.text[plan.index],
      "text_mask": np.arange(length) < lengths[:, None],
    }


def open_noise(
  latents: tuple[int, int, int],
  text: tuple[int, int],
  *,
  batch_size: int,
  seed: int,
) -> loader.HostBatches:
  """Returns batches of unit variance; (seed, step) tells which.

  Args:
    latents: height, width and channels of one.
    text: tokens and width of one.
    batch_size: of all hosts together.
  """
  rng = np.random.default_rng(seed)

  def draw(shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal((_ROWS, *shape), np.float32)
    return values.astype(cache_records.BFLOAT16)

  everything = sampler.Population("noise", 1.0, (np.arange(_ROWS),))
  return loader.planned_batches(
    sampler.BatchSampler([everything], batch_size, seed),
    batch_size,
    NoiseReader(draw(latents), draw(text)),
  )
