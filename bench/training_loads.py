"""Training steps that are measured, and the batches of both sides."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from bench import workloads
from sana_jax import config as config_lib

COMPRESSION = 32
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01
CLIP_NORM = 0.1
EMA_DECAY = 0.9999


class Load(NamedTuple):
  """One kind of step.

  Attributes:
    dtype: of the matrix products; parameters are float32.
    remat: "full": the blocks are evaluated again on the way back.
    tolerance: of losses and norms of the first two steps.
    goal: ratio to PyTorch that is hoped for.
    mfu: share of the chip's peak that is hoped for.
  """

  model: Callable[[], config_lib.SanaConfig]
  pixels: int
  batch: int
  text_length: int = workloads.TEXT_LENGTH
  dtype: str = "float32"
  remat: str = "none"
  tolerance: float = 1e-4
  goal: float | None = None
  mfu: float | None = None


def _small_600m() -> config_lib.SanaConfig:
  return dataclasses.replace(
    config_lib.sana_600m(), num_layers=4, sample_size=16
  )


def _tiny() -> config_lib.SanaConfig:
  return workloads.SIZES["tiny"].checkpoints["tiny"]().transformer


_FULL = {"dtype": "bfloat16", "remat": "full", "tolerance": 3e-2, "mfu": 0.4}
LOADS: Mapping[str, Mapping[str, Load]] = {
  "small": {"600m_4_blocks_512": Load(_small_600m, 512, 2, goal=1.3)},
  "full": {
    "600m_1024": Load(config_lib.sana_600m, 1024, 32, **_FULL),
    "1600m_1024": Load(config_lib.sana_1600m, 1024, 32, **_FULL),
  },
  "tiny": {"tiny": Load(_tiny, 128, 2, 7)},
}


def batches(load: Load, seed: int = 0) -> Iterator[dict[str, np.ndarray]]:
  """Yields noise: latents, text states, and what a step draws at random."""
  rng = np.random.default_rng(seed)
  config, side = load.model(), load.pixels // COMPRESSION
  shape = (load.batch, side, side, config.in_channels)
  text = (load.batch, load.text_length, config.caption_channels)
  while True:
    lengths = rng.integers(2, load.text_length + 1, size=(load.batch, 1))
    yield {
      "latents": rng.normal(size=shape).astype(np.float32),
      "noise": rng.normal(size=shape).astype(np.float32),
      "sigma": rng.uniform(0.05, 0.95, load.batch).astype(np.float32),
      "text": rng.normal(size=text).astype(np.float32),
      "text_mask": np.arange(load.text_length) < lengths,
    }
