"""How long a step takes at least: computing, memory and network side by side.

Each is counted as if it had the chip to itself and the longest hid the others.
A step can take longer, for what does not overlap, and hardly less.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from sana_jax import config as config_lib
from sana_jax import flops, hardware

# Reads and writes of one block forward, in values of the residual stream for
# each token, when every operation reads its operands from memory and writes
# its result there: bytes for a compute type of 2, with the float32 ones.
#   2 norms with modulation          2 (4 + 2)
#   queries, keys, values            2 (1 + 3);  linear attention  2 (3 + 1)
#   3 more projections in, out       2 (2 + 2 + 2)
#   cross-attention                  2 (1 + 1)
#   3 gated additions                3 (2 + 4 + 4)
# and in values of the hidden width, `mlp_ratio` times as wide:
#   expansion 2 (2), activation and depthwise 2 (2 + 2), gate 2 (2 + 1),
#   contraction 2 (1)
_PER_WIDTH = 12 + 8 + 8 + 12 + 4 + 30
_PER_HIDDEN = 4 + 8 + 6 + 2
# Forward, and backward twice that; "full" and "offload" recompute what
# "none" keeps.
_PASSES = {"none": 3, "dots": 3.5, "full": 4, "offload": 4}
_GATHERED = 2


class Times(NamedTuple):
  """Seconds of a step."""

  compute: float
  memory: float
  network: float

  @property
  def step(self) -> float:
    return max(self)

  @property
  def bound(self) -> str:
    """Which of them is the longest."""
    return max(self._fields, key=lambda name: getattr(self, name))


class Prediction(NamedTuple):
  """What follows of a step's time."""

  images_per_second: float
  hours: float
  chip_hours: float


def compute_seconds(
  config: config_lib.TextToImageConfig,
  chip: hardware.Chip,
  *,
  chips: int,
  latent_size: tuple[int, int],
  efficiency: float,
) -> float:
  """Returns what the matrix products of a step take.

  Args:
    efficiency: share of the chip's peak that they reach.
  """
  return step_flops(config, latent_size) / (chips * chip.flops * efficiency)


def step_flops(
  config: config_lib.TextToImageConfig, latent_size: tuple[int, int]
) -> int:
  """Counts the operations of a step for all of its images."""
  # Of a compression of 1, pixels are latents.
  forward = flops.forward(
    config.model,
    *latent_size,
    compression=1,
    text_length=config.max_sequence_length,
  )
  return config.batch_size * flops.training(forward, remat=config.remat)


def memory_seconds(
  config: config_lib.TextToImageConfig,
  chip: hardware.Chip,
  *,
  state_bytes: int,
  tokens: float,
  parameters: float,
) -> float:
  """Returns what reading and writing the chip's memory takes.

  Args:
    state_bytes: parameters, optimiser and average of a chip: read and written.
    tokens: of a chip's images.
    parameters: that a chip multiplies with, its share of tensor parallelism.
  """
  model = config.model
  block = model.width * (_PER_WIDTH + _PER_HIDDEN * model.mlp_ratio)
  activations = _PASSES[config.remat] * tokens * model.num_layers * block
  weights = _PASSES[config.remat] * 2 * _GATHERED * parameters
  return (2 * state_bytes + activations + weights) / chip.hbm_bandwidth


def network_seconds(
  sent: Mapping[tuple[tuple[str, ...], str], float],
  chip: hardware.Chip,
  mesh: Mapping[str, int],
  num_slices: int = 1,
) -> float:
  """Returns what sending takes, over links and between slices at once.

  The data axis crosses slices. Summing over it is done in a slice first, so
  that each of its chips sends a share of the sum to the other slices.

  Args:
    sent: bytes of a device by (mesh axes, kind).
  """
  links = sum(sent.values()) / chip.link_bandwidth
  if num_slices == 1:
    return links
  inside = mesh["data"] // num_slices
  crossing = sum(n for (axes, _), n in sent.items() if "data" in axes)
  return max(links, crossing / inside / chip.network_bandwidth)


def predict(
  step_seconds: float, *, batch_size: int, chips: int, num_images: float
) -> Prediction:
  """Returns how fast and how long a run is."""
  rate = batch_size / step_seconds
  hours = num_images / rate / 3600
  return Prediction(rate, hours, hours * chips)


def tokens_of(
  config: config_lib.TextToImageConfig, latent_size: tuple[int, int]
) -> int:
  """Counts the tokens of an image."""
  return math.prod(side // config.model.patch_size for side in latent_size)
