"""A look at latents that costs next to nothing, while they are being made."""

import dataclasses

import numpy as np
from jaxtyping import Float, UInt8

from sana_jax import images as images_lib

# Sides of the patch that stands for a latent, at most: 32 channels hold more
# than one colour.
_PATCH = 8
# Relative to the mean square of the latents' channels.
_RIDGE = 1e-2


@dataclasses.dataclass(frozen=True)
class Preview:
  """A linear map from each latent to a patch of colours.

  Attributes:
    weights: of the channels, and last of the constant 1.
    explained: the share of the variance that it explains where it was fitted.
  """

  weights: Float[np.ndarray, "c+1 k k 3"]
  explained: float

  def __call__(
    self, latents: Float[np.ndarray, "n h w c"]
  ) -> UInt8[np.ndarray, "rows cols 3"]:
    """Returns the pictures [h*k, w*k] of a batch, side by side."""
    count, height, width, _ = latents.shape
    patch = self.weights.shape[1]
    colours = np.tensordot(_with_one(latents), self.weights, 1)
    rows = colours.transpose(1, 3, 0, 2, 4, 5)
    return images_lib.to_uint8(
      rows.reshape(height * patch, count * width * patch, 3)
    )


def locations_needed(channels: int) -> int:
  """Returns how many latents a fit should see."""
  return 4 * (channels + 1)


def fit(
  latents: Float[np.ndarray, "n h w c"],
  images: Float[np.ndarray, "n height width 3"],
) -> Preview:
  """Fits by least squares what the decoder makes of latents.

  Args:
    images: in [0, 1], whole multiples of the latents in size.

  Raises:
    ValueError: other sizes.
  """
  count, height, width, channels = latents.shape
  factor = images.shape[1] // height
  if images.shape != (count, height * factor, width * factor, 3):
    raise ValueError(
      f"images have shape {images.shape}; expected a whole multiple of the "
      f"latents' {latents.shape}."
    )
  patch = min(factor, _PATCH)
  while factor % patch:
    patch -= 1
  part = factor // patch
  # [n, h, k, part, w, k, part, 3]: the mean over the two parts.
  split = images.reshape(count, height, patch, part, width, patch, part, 3)
  targets = split.mean((3, 6)).transpose(0, 1, 3, 2, 4, 5)
  targets = targets.reshape(-1, patch * patch * 3).astype(np.float64)
  inputs = _with_one(latents).reshape(-1, channels + 1).astype(np.float64)
  ridge = np.full(
    channels + 1, _RIDGE * np.square(latents).mean() * len(inputs)
  )
  ridge[-1] = 0  # the constant is free
  gram = inputs.T @ inputs + np.diag(ridge)
  weights = np.linalg.lstsq(gram, inputs.T @ targets, rcond=None)[0]
  rest = np.square(targets - inputs @ weights).sum()
  whole = np.square(targets - targets.mean(0)).sum()
  return Preview(
    weights.reshape(channels + 1, patch, patch, 3).astype(np.float32),
    float(1 - rest / whole) if whole else 1.0,
  )


def _with_one(latents: np.ndarray) -> np.ndarray:
  return np.concatenate([latents, np.ones_like(latents[..., :1])], axis=-1)
