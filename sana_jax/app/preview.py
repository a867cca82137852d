"""A look at latents that costs next to nothing, while they are being made."""

import dataclasses

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from sana_jax import images as images_lib

# Side of the patch of colours that stands for a latent, at most: its many
# channels hold more than one.
_PATCH = 4
# Shown so many times larger, smoothly, which hides the seams of the patches.
_ENLARGED = 2
# Relative to the mean square of the latents: there are hardly more of them than
# coefficients, and those of early steps are off the ones it is fitted to.
_RIDGE = 0.5


@dataclasses.dataclass(frozen=True)
class Preview:
  """A linear map from each latent and its neighbours to a patch of colours.

  Attributes:
    weights: of the channels of the 3x3 neighbourhood, and of the constant 1.
    explained: the share of the variance that it explains where it was fitted.
  """

  weights: Float[np.ndarray, "features k k 3"]
  explained: float

  def __call__(
    self, latents: Float[np.ndarray, "n h w c"]
  ) -> UInt8[np.ndarray, "rows cols 3"]:
    """Returns the pictures of a batch, 8 times as large, side by side."""
    count, height, width, _ = latents.shape
    patch = self.weights.shape[1]
    colours = np.tensordot(_features(latents), self.weights, 1)
    rows = colours.transpose(0, 1, 3, 2, 4, 5)
    pictures = rows.reshape(count, height * patch, width * patch, 3)
    large = (width * patch * _ENLARGED, height * patch * _ENLARGED)
    return np.concatenate(
      [
        np.asarray(picture.resize(large, PIL.Image.Resampling.BILINEAR))
        for picture in images_lib.to_pil(pictures)
      ],
      axis=1,
    )


def enough(latents: Float[np.ndarray, "n h w c"]) -> bool:
  """Says whether a fit to so many latents is worth looking at."""
  count, height, width, channels = latents.shape
  return count >= 4 and count * height * width >= 8 * channels


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
  count, height, width, _ = latents.shape
  factor = images.shape[1] // height
  if images.shape != (count, height * factor, width * factor, 3):
    raise ValueError(
      f"images have shape {images.shape}; expected a whole multiple of the "
      f"latents' {latents.shape}."
    )
  patch = max(k for k in range(1, _PATCH + 1) if factor % k == 0)
  part = factor // patch
  # [n, h, k, part, w, k, part, 3]: the mean over the two parts.
  split = images.reshape(count, height, patch, part, width, patch, part, 3)
  targets = split.mean((3, 6)).transpose(0, 1, 3, 2, 4, 5)
  targets = targets.reshape(-1, patch * patch * 3).astype(np.float64)
  inputs = _features(latents).astype(np.float64)
  inputs = inputs.reshape(-1, inputs.shape[-1])
  ridge = np.full(
    inputs.shape[1], _RIDGE * np.square(latents).mean() * len(inputs)
  )
  ridge[-1] = 0  # the constant is free
  gram = inputs.T @ inputs + np.diag(ridge)
  weights = np.linalg.lstsq(gram, inputs.T @ targets, rcond=None)[0]
  rest = np.square(targets - inputs @ weights).sum()
  whole = np.square(targets - targets.mean(0)).sum()
  return Preview(
    weights.reshape(-1, patch, patch, 3).astype(np.float32),
    float(1 - rest / whole) if whole else 1.0,
  )


def _features(latents: np.ndarray) -> np.ndarray:
  """Returns each latent's neighbourhood, the border repeated, and a 1."""
  _, height, width, _ = latents.shape
  padded = np.pad(latents, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
  shifted = [
    padded[:, top : top + height, left : left + width]
    for top in range(3)
    for left in range(3)
  ]
  return np.concatenate([*shifted, np.ones_like(latents[..., :1])], axis=-1)
