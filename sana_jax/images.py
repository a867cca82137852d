"""Pictures: arrays to PNG files that know how they were made, and grids."""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
from etils import epath
from jaxtyping import Float, UInt8


def to_uint8(
  images: Float[np.ndarray, "*b h w 3"],
) -> UInt8[np.ndarray, "*b h w 3"]:
  """Rounds images in [0, 1] to the nearest of 256 levels."""
  return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def to_pil(images: Float[np.ndarray, "b h w 3"]) -> list[PIL.Image.Image]:
  return [PIL.Image.fromarray(image) for image in to_uint8(images)]


def grid(
  images: Float[np.ndarray, "n h w 3"] | Sequence[Float[np.ndarray, "h w 3"]],
  *,
  columns: int | None = None,
) -> Float[np.ndarray, "rows cols 3"]:
  """Lays images of one size out row by row, empty places white.

  Args:
    images: in [0, 1].
    columns: None makes the grid about square.

  Raises:
    ValueError: no images, or images of different sizes.
  """
  shapes = {image.shape for image in images}
  if len(shapes) != 1:
    raise ValueError(
      f"A grid needs images of one size, got {sorted(shapes) or 'none'}."
    )
  height, width, channels = shapes.pop()
  columns = columns or math.ceil(math.sqrt(len(images)))
  rows = math.ceil(len(images) / columns)
  canvas = np.ones((rows, columns, height, width, channels), np.float32)
  for i, image in enumerate(images):
    canvas[i // columns, i % columns] = image
  return canvas.transpose(0, 2, 1, 3, 4).reshape(
    rows * height, columns * width, channels
  )


def encode_png(
  image: Float[np.ndarray, "h w 3"],
  metadata: Mapping[str, str] | None = None,
) -> bytes:
  """Makes a PNG of an image in [0, 1], with text chunks as metadata."""
  info = PIL.PngImagePlugin.PngInfo()
  for key, value in (metadata or {}).items():
    info.add_itxt(key, value)
  buffer = io.BytesIO()
  PIL.Image.fromarray(to_uint8(image)).save(buffer, "PNG", pnginfo=info)
  return buffer.getvalue()


def write_png(
  path: epath.PathLike,
  image: Float[np.ndarray, "h w 3"],
  *,
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a PNG file; see `encode_png`."""
  epath.Path(path).write_bytes(encode_png(image, metadata))
