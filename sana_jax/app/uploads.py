"""Bytes that somebody sent, to a picture: nothing is decoded unseen."""

import io
import warnings

import PIL.Image
import PIL.ImageOps

from sana_jax.app.errors import InvalidRequestError
from sana_jax.app.limits import Limits

FORMATS = ("PNG", "JPEG", "WEBP")


def read_picture(
  data: bytes, limits: Limits, *, field: str = "image"
) -> PIL.Image.Image:
  """Decodes a picture, the right way up and over white.

  Its size is taken from the header, and is small enough before a pixel is
  decoded.

  Args:
    field: of the request, for messages.

  Returns:
    A picture of mode "RGB" without anything else of the file.

  Raises:
    InvalidRequestError: too large, broken, animated, or of another format.
  """

  def refuse(message: str, cause: Exception | None = None):
    raise InvalidRequestError(field, f"{field} {message}") from cause

  if len(data) > limits.max_upload_bytes:
    refuse(
      f"has {len(data)} bytes; at most {limits.max_upload_bytes} are allowed. "
      "Scale it down."
    )
  try:
    with warnings.catch_warnings():
      # Our own bound is checked below, before anything is decoded.
      warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
      picture = PIL.Image.open(io.BytesIO(data), formats=FORMATS)
  except PIL.Image.DecompressionBombError as error:
    refuse("has far too many pixels. Scale it down.", error)
  except Exception as error:  # parsers of hostile bytes raise all kinds
    refuse(f"is not a readable picture; send {', '.join(FORMATS)}.", error)
  with picture:
    if picture.width * picture.height > limits.max_upload_pixels:
      refuse(
        f"has {picture.width}x{picture.height} pixels; at most "
        f"{limits.max_upload_pixels} are allowed. Scale it down."
      )
    if getattr(picture, "is_animated", False):
      refuse("is animated; send a single picture.")
    try:
      picture.load()
      return _plain(picture)
    except Exception as error:
      refuse("is broken or cut off; send it again.", error)


def _plain(picture: PIL.Image.Image) -> PIL.Image.Image:
  upright = PIL.ImageOps.exif_transpose(picture)
  if upright.mode.startswith("I"):  # 16 bits, which Pillow would cut off
    upright = upright.point(lambda level: level / 257).convert("L")
  if "A" in upright.getbands() or "transparency" in upright.info:
    layers = upright.convert("RGBA")
    ground = PIL.Image.new("RGBA", layers.size, "white")
    upright = PIL.Image.alpha_composite(ground, layers)
  plain = upright.convert("RGB")
  plain.info.clear()
  return plain
