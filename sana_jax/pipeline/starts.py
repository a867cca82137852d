"""What a generation starts from: nothing, an image, or an image and a mask."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sana_jax import notices, resolution
from sana_jax.diffusion import schedules
from sana_jax.pipeline import denoising, options, pictures, sizes

_STRENGTH = 0.6
# Of its two steps, 0.6 would skip none and so forget the image.
_SPRINT_STRENGTH = 0.5


@dataclasses.dataclass(frozen=True)
class Start:
  """An image to begin with, in [0, 1] and of the size that is generated.

  Args:
    image: one for all, or one for each image that is made.
    mask: likewise, 1 where the image is made anew; None: everywhere.
    latent_mask: the mask on the latent grid, where it is 0 or 1.
    size: what is generated.
  """

  size: sizes.ImageSize
  image: Float[np.ndarray, "n height width 3"] | None = None
  mask: Float[np.ndarray, "m height width 1"] | None = None
  latent_mask: Float[np.ndarray, "m h w 1"] | None = None

  def strength(
    self, settings: options.GenerationConfig, *, is_sprint: bool
  ) -> float:
    """Returns the share of the sampler's steps that is run.

    Warns when it is so large that the image is forgotten.
    """
    if self.image is None:
      return 1.0
    strength = settings.strength
    if strength is None and self.mask is not None:
      return 1.0
    if strength is None:
      strength = _SPRINT_STRENGTH if is_sprint else _STRENGTH
    steps = settings.num_inference_steps
    skipped = schedules.begin_index(steps, strength)
    if self.mask is None and strength < 1 and not skipped:
      notices.warn(
        f"strength {strength} makes everything anew in {steps} steps: the "
        "result will owe the image almost nothing. Take more steps, or a "
        f"strength of at most {1 - 1 / steps:.3g}.",
        stacklevel=4,
      )
    return strength

  def known(
    self, clean: Float[Array, "n h w c"], noise: Float[Array, "n h w c"]
  ) -> denoising.Known | None:
    """Returns what stays of the image, given its latents."""
    if self.latent_mask is None:
      return None
    shape = (clean.shape[0], *self.latent_mask.shape[1:])
    return denoising.Known(
      clean, noise, jnp.broadcast_to(self.latent_mask, shape)
    )

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
    shape = images.shape
    image = jnp.broadcast_to(image, shape)
    mask = jnp.broadcast_to(mask, (*shape[:3], 1))
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
    ValueError: pictures that do not fit each other, the size, or the count, or
      a mask that leaves nothing to make.
  """
  if image is None:
    return Start(size)
  start = Start(size, read_picture(image, size, count, name="image"))
  if mask_image is None:
    return start
  mask = pictures.read_mask(mask_image, image, *size.generated)
  pictures.check_count(mask, count, name="mask_image")
  latent_mask = np.asarray(pictures.latent_mask(mask, *size.grid))
  empty = np.flatnonzero(~latent_mask.any(axis=(1, 2, 3)))
  if empty.size:
    raise ValueError(
      f"mask_image {empty[0]} has nothing to make anew: white is drawn, and no "
      f"white covers half of a latent ({size.compression}x{size.compression} "
      "pixels). Enlarge it, or swap black and white."
    )
  return dataclasses.replace(start, mask=mask, latent_mask=latent_mask)


def read_picture(
  picture: pictures.Picture | None,
  size: sizes.ImageSize,
  count: int,
  *,
  name: str,
) -> Float[np.ndarray, "n height width 3"] | None:
  """Reads one picture for all of `count` images, or one for each.

  Raises:
    ValueError: a size or count that does not fit.
  """
  if picture is None:
    return None
  array = pictures.read_image(picture, *size.generated, name=name)
  pictures.check_count(array, count, name=name)
  return array
