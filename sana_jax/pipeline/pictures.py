"""Pictures that users hand in: image, mask and control image, made arrays."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Array, Float

# A PIL image of any size and mode, or an array "[n] height width channels" in
# [0, 1] of exactly the size that is generated.
Picture = Any

_MASK_THRESHOLD = 0.5


def aspect_ratio(picture: Picture) -> float:
  """Returns height / width."""
  height, width = _size(picture)
  return height / width


def read_image(
  picture: Picture, height: int, width: int, *, name: str
) -> Float[np.ndarray, "n height width 3"]:
  """Returns the picture in [0, 1] at a size.

  A PIL image is scaled (Lanczos) until it covers the size, and cropped; an
  array is taken as it is.

  Raises:
    ValueError: an array of another size, or with values outside [0, 1].
  """
  if isinstance(picture, PIL.Image.Image):
    upright = _eight_bit(PIL.ImageOps.exif_transpose(picture))
    return _fit(_over_white(upright), height, width)[None]
  return _read_array(picture, (height, width, 3), name)


def read_mask(
  mask: Picture, image: Picture, height: int, width: int
) -> Float[np.ndarray, "n height width 1"]:
  """Returns a mask in [0, 1], 1 where the image is to be made anew.

  Raises:
    ValueError: a mask of another size than `image`, or, as an array, than the
      size that is generated.
  """
  if _size(mask) != _size(image):
    raise ValueError(
      f"mask_image is {_described(mask)}, image is {_described(image)}; they "
      "must have the same size."
    )
  if isinstance(mask, PIL.Image.Image):
    upright = _eight_bit(PIL.ImageOps.exif_transpose(mask)).convert("L")
    return _fit(upright, height, width)[None, ..., None]
  mask = np.asarray(mask)
  if mask.ndim == 2 or mask.shape[-1] != 1:
    mask = mask[..., None]
  return _read_array(mask, (height, width, 1), "mask_image")


def check_count(
  pictures: Float[np.ndarray, "n height width c"], count: int, *, name: str
) -> None:
  """Raises ValueError unless there is one picture, or one for each image."""
  if pictures.shape[0] not in (1, count):
    raise ValueError(
      f"{name} holds {pictures.shape[0]} pictures for {count} images; give "
      "one, or one for each."
    )


def latent_mask(
  mask: Float[np.ndarray, "n height width 1"], height: int, width: int
) -> Float[Array, "n h w 1"]:
  """Scales a mask to the latent grid, where it is 0 or 1.

  A latent is made anew if more than half of what it stands for is.
  """
  shape = (mask.shape[0], height, width, 1)
  small = jax.image.resize(jnp.asarray(mask), shape, "linear", antialias=True)
  return (small > _MASK_THRESHOLD).astype(jnp.float32)


def _size(picture: Picture) -> tuple[int, int]:
  if isinstance(picture, PIL.Image.Image):
    # What the EXIF orientation makes of (width, height), without the work.
    swapped = picture.getexif().get(0x0112, 1) >= 5
    return picture.size if swapped else picture.size[::-1]
  shape = np.shape(picture)
  if len(shape) == 2:
    return shape
  if len(shape) in (3, 4) and shape[-1] in (1, 3):
    return shape[-3:-1]
  if len(shape) == 3:  # masks without a channel axis
    return shape[-2:]
  raise ValueError(
    f"A picture must be a PIL image or an array (height, width, channels), got "
    f"{type(picture).__name__} of shape {shape}."
  )


def _described(picture: Picture) -> str:
  height, width = _size(picture)
  return f"{width}x{height} pixels"


def _eight_bit(picture: PIL.Image.Image) -> PIL.Image.Image:
  """Rounds 16 bits to 8, which Pillow's own conversion cuts off at 255."""
  if not picture.mode.startswith("I"):
    return picture
  levels = np.asarray(picture, np.float64) / 65535
  return PIL.Image.fromarray(np.rint(levels.clip(0, 1) * 255).astype(np.uint8))


def _over_white(picture: PIL.Image.Image) -> PIL.Image.Image:
  if "A" not in picture.getbands() and "transparency" not in picture.info:
    return picture.convert("RGB")
  layers = picture.convert("RGBA")
  ground = PIL.Image.new("RGBA", layers.size, "white")
  return PIL.Image.alpha_composite(ground, layers).convert("RGB")


def _fit(
  picture: PIL.Image.Image, height: int, width: int
) -> Float[np.ndarray, "height width *channels"]:
  fitted = PIL.ImageOps.fit(
    picture, (width, height), PIL.Image.Resampling.LANCZOS
  )
  return np.asarray(fitted, np.float32) / 255


def _read_array(
  picture: Picture, shape: tuple[int, int, int], name: str
) -> Float[np.ndarray, "n height width channels"]:
  array = np.asarray(picture)
  array = array[None] if array.ndim == 3 else array
  if array.shape[1:] != shape:
    raise ValueError(
      f"{name} is an array of shape {np.shape(picture)}; expected "
      f"(..., {', '.join(map(str, shape))}), the size that is generated. Pass "
      "a PIL image to have it scaled and cropped."
    )
  if array.dtype.kind != "f" or not 0 <= array.min() <= array.max() <= 1:
    raise ValueError(
      f"{name} must have float values in [0, 1], got {array.dtype} from "
      f"{array.min()} to {array.max()}."
    )
  return array.astype(np.float32)
