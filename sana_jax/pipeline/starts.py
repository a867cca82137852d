"""What a generation starts from: nothing, an image, or an image and a mask."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sana_jax import resolution
from sana_jax.pipeline import denoising, options, pictures, sizes

_IMAGE_STRENGTH = 0.6


@dataclasses.dataclass(frozen=True)
class Start:
  """An image to begin with, in [0, 1] and of the size that is generated.

  Args:
    mask: 1 where the image is made anew; None: everywhere.
    size: what is generated.
  """

  image: Float[np.ndarray, "n height width 3"] | None
  mask: Float[np.ndarray, "n height width 1"] | None
  size: sizes.ImageSize

  def strength(self, settings: options.GenerationConfig) -> float:
    """Returns the share of the sampler's steps that is run."""
    if self.image is None:
      return 1.0
    if settings.strength is not None:
      return settings.strength
    return _IMAGE_STRENGTH if self.mask is None else 1.0

  def known(
    self, clean: Float[Array, "n h w c"], noise: Float[Array, "n h w c"]
  ) -> denoising.Known | None:
    """Returns what stays of the image, given its latents."""
    if self.mask is None:
      return None
    grid = (self.size.latent_height, self.size.latent_width)
    return denoising.Known(clean, noise, pictures.latent_mask(self.mask, *grid))

  def composite(
    self, images: Float[Array, "n height width 3"]
  ) -> Float[Array, "n height width 3"]:
    """Puts the image's own pixels back where the mask says they stay."""
    if self.mask is None:
      return images
    image, mask = (
      resolution.cover_and_crop(
        jnp.asarray(picture), self.size.height, self.size.width
      )
      for picture in (self.image, self.mask)
    )
    return mask * images + (1 - mask) * image


def ratio(image: pictures.Picture | None) -> float | None:
  """Returns the image's height / width."""
  return None if image is None else pictures.aspect_ratio(image)


def read(
  image: pictures.Picture | None,
  mask_image: pictures.Picture | None,
  size: sizes.ImageSize,
  count: int,
) -> Start:
  """Reads what a user hands in, for `count` images.

  Raises:
    ValueError: pictures that do not fit each other, the size, or the count.
  """
  if image is None:
    return Start(None, None, size)
  mask = None
  if mask_image is not None:
    mask = pictures.read_mask(mask_image, image, *size.generated)
    mask = pictures.repeat(mask, count, name="mask_image")
  image = pictures.read_image(image, *size.generated, name="image")
  return Start(pictures.repeat(image, count, name="image"), mask, size)


def read_control(
  control_image: pictures.Picture | None, size: sizes.ImageSize, count: int
) -> Float[np.ndarray, "n height width 3"] | None:
  """Reads what a ControlNet follows, for `count` images."""
  if control_image is None:
    return None
  name = "control_image"
  control = pictures.read_image(control_image, *size.generated, name=name)
  return pictures.repeat(control, count, name=name)
