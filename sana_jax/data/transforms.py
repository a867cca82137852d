"""Contents of image files to arrays of the size that is trained at."""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageCms
import PIL.ImageOps
from jaxtyping import UInt8

# A picture of 16k x 16k; a file that says it is larger is not decoded.
MAX_PIXELS = 2**28

_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)
_RESAMPLE = {
  "bicubic": PIL.Image.Resampling.BICUBIC,
  "lanczos": PIL.Image.Resampling.LANCZOS,
}
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N")
# What Pillow raises for contents that are not what their header says.
_DAMAGES = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
  IndexError,
  TypeError,
  OverflowError,
  struct.error,
  zlib.error,
)


def decode(image: bytes) -> PIL.Image.Image:
  """Decodes the contents of an image file to RGB as people see it.

  It is turned as its EXIF data say; what is transparent is white; CMYK goes
  through its colour profile, where it has one; 16 bits are rounded to 8; of an
  animation it is the first frame.

  Raises:
    ValueError: it is not an image, is cut off or damaged, has more than
      `MAX_PIXELS`, or its pixels (32-bit TIFF) have no known range.
  """
  with opened(image) as picture:
    with _explained("The image is cut off or damaged"):
      picture.load()
    orientation = _left_to_turn(picture, image)
    picture = _to_rgb(picture)
  # What EXIF says is applied once, and not carried along.
  exif = PIL.Image.Exif()
  exif[_ORIENTATION] = orientation
  picture.info = {"exif": exif.tobytes()} if orientation != 1 else {}
  turned = PIL.ImageOps.exif_transpose(picture)
  turned.info = {}
  return turned


def header(image: bytes) -> tuple[int, int]:
  """Returns (height, width) after EXIF, without decoding the pixels.

  Raises:
    ValueError: it is not an image, or has more than `MAX_PIXELS`.
  """
  with opened(image) as picture:
    width, height = picture.size
    sideways = _left_to_turn(picture, image) in _SIDEWAYS
  return (width, height) if sideways else (height, width)


def is_turned(image: bytes) -> bool:
  """Returns whether EXIF says that it is not to be shown as it is stored."""
  with opened(image) as picture:
    return _orientation(picture, image) != 1


def fit(
  image: PIL.Image.Image,
  height: int,
  width: int,
  *,
  crop: Literal["center", "random"] = "center",
  flip: bool = False,
  rng: np.random.Generator | None = None,
  resample: Literal["bicubic", "lanczos"] = "bicubic",
) -> UInt8[np.ndarray, "{height} {width} 3"]:
  """Scales an image until it covers (height, width), and crops.

  Antialiased; the side that sticks out is truncated to an integer.

  Args:
    image: RGB.
    crop: "random": every place is as likely as the others.
    flip: mirrors one image in two.
    rng: needed by what is random.
    resample: see `resolution.reference_filter`.

  Raises:
    ValueError: a size, crop or filter that cannot be, or no rng.

  Source: NVlabs/Sana diffusion/data/datasets/sana_data_multi_scale.py.
  """
  _check_fit(image, height, width, crop, flip, rng, resample)
  old_width, old_height = image.size
  # In integers: a quotient of floats may fall one pixel short.
  if height * old_width > width * old_height:
    size = (old_width * height // old_height, height)
  else:
    size = (width, old_height * width // old_width)
  if size != image.size:
    image = image.resize(size, _RESAMPLE[resample])
  spare = (image.height - height, image.width - width)
  if crop == "center":
    top, left = (round(extra / 2) for extra in spare)
  else:
    top, left = (int(rng.integers(extra + 1)) for extra in spare)
  array = np.asarray(image)[top : top + height, left : left + width]
  if flip and rng.random() < 0.5:
    array = array[:, ::-1]
  return np.ascontiguousarray(array)


def _check_fit(image, height, width, crop, flip, rng, resample) -> None:
  problems = []
  if image.mode != "RGB":
    problems.append(f"image must be RGB, as decode makes it, got {image.mode}")
  if height < 1 or width < 1:
    problems.append(f"height and width must be positive, got {height}, {width}")
  if crop not in ("center", "random"):
    problems.append(f"crop must be 'center' or 'random', got {crop!r}")
  if resample not in _RESAMPLE:
    problems.append(
      f"resample must be one of {', '.join(_RESAMPLE)}, got {resample!r}"
    )
  if rng is None and (flip or crop == "random"):
    problems.append("crop='random' and flip=True need rng")
  if problems:
    raise ValueError("fit: " + "; ".join(problems) + ".")


@contextlib.contextmanager
def opened(image: bytes) -> Iterator[PIL.Image.Image]:
  """Opens an image whose header is sound; the pixels are not read.

  Raises:
    ValueError: see `header`.
  """
  if not image:
    raise ValueError("The image file is empty: it has no bytes.")
  with _explained("This is no image that can be read"):
    picture = PIL.Image.open(io.BytesIO(image))
  with picture:
    width, height = picture.size
    if width * height > MAX_PIXELS:
      raise ValueError(
        f"The image says it is {width} x {height} pixels, more than "
        f"{MAX_PIXELS:,}: scale it down."
      )
    yield picture


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
  try:
    yield
  except PIL.Image.DecompressionBombError as error:
    raise ValueError(
      f"The image says it has too many pixels to be a picture: {error}"
    ) from error
  except PIL.UnidentifiedImageError as error:
    raise ValueError(f"{what}: its format is unknown.") from error
  except _DAMAGES as error:
    raise ValueError(f"{what}: {error}.") from error


def _left_to_turn(picture: PIL.Image.Image, image: bytes) -> int:
  # Pillow turns TIFF files itself.
  return 1 if picture.format == "TIFF" else _orientation(picture, image)


def _orientation(picture: PIL.Image.Image, image: bytes) -> int:
  """Reads EXIF's orientation, 1 when there is none, without the pixels."""
  if picture.format == "PNG" and "exif" not in picture.info:
    # Pillow would decode a PNG to look for EXIF data behind the pixels.
    content = _png_exif(image)
    if content is None:
      return 1
    exif = PIL.Image.Exif()
  else:
    content, exif = None, None
  try:
    if exif is None:
      exif = picture.getexif()
    else:
      exif.load(content)
    orientation = exif.get(_ORIENTATION, 1)
  except _DAMAGES:
    # Broken EXIF data are common in sound pictures; viewers ignore them too.
    return 1
  return orientation if orientation in range(1, 9) else 1


def _png_exif(image: bytes) -> bytes | None:
  position = 8
  while position + 8 <= len(image):
    (length,) = struct.unpack_from(">I", image, position)
    if image[position + 4 : position + 8] == b"eXIf":
      return image[position + 8 : position + 8 + length]
    position += 12 + length
  return None


def _to_rgb(picture: PIL.Image.Image) -> PIL.Image.Image:
  if picture.mode in _SIXTEEN_BIT or (
    picture.mode == "I" and picture.format == "PNG"
  ):
    values = np.asarray(picture).astype(np.uint32)
    # 65535 is white as 255 is: 257 levels to one.
    grey = ((values + 128) // 257).astype(np.uint8)
    return PIL.Image.fromarray(grey).convert("RGB")
  if picture.mode in ("I", "F"):
    raise ValueError(
      f"The image has 32-bit pixels ({picture.mode}) without a range that all "
      "agree on: convert it to 8 or 16 bits."
    )
  if picture.mode == "CMYK":
    return _from_cmyk(picture)
  if picture.has_transparency_data:
    picture = picture.convert("RGBA")
    white = PIL.Image.new("RGBA", picture.size, "white")
    picture = PIL.Image.alpha_composite(white, picture)
  return picture.convert("RGB")


def _from_cmyk(picture: PIL.Image.Image) -> PIL.Image.Image:
  profile = picture.info.get("icc_profile")
  if profile:
    with contextlib.suppress(PIL.ImageCms.PyCMSError, OSError):
      return PIL.ImageCms.profileToProfile(
        picture,
        PIL.ImageCms.ImageCmsProfile(io.BytesIO(profile)),
        PIL.ImageCms.createProfile("sRGB"),
        outputMode="RGB",
      )
  return picture.convert("RGB")
