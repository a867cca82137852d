"""What is wrong with one record."""

import dataclasses
import posixpath
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from sana_jax import resolution
from sana_jax.data import records, transforms
from sana_jax.data.sources import access

# A picture that loses more of its area to its bucket is probably misplaced.
_MOST_CROPPED = 0.2
_HASH_SIDE = 8
_FORMATS = {
  **dict.fromkeys((".jpg", ".jpeg", ".jfif"), ("JPEG", "MPO")),
  **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
  ".png": ("PNG",),
  ".webp": ("WEBP",),
  ".gif": ("GIF",),
  ".bmp": ("BMP",),
  ".avif": ("AVIF",),
}


@dataclasses.dataclass(frozen=True)
class Finding:
  """A fact about a record; see `diagnosis.MEANINGS` for the codes."""

  code: str
  detail: str


@dataclasses.dataclass
class Examined:
  """A record's findings, and what comparing it with others needs.

  Attributes:
    size: (height, width) after EXIF; None: it cannot be decoded.
    outline: signs of differences between neighbouring pixels of a tiny copy.
    colors: a tinier copy.
  """

  index: int
  key: str
  findings: list[Finding]
  size: tuple[int, int] | None = None
  outline: bytes = b""
  colors: Float[np.ndarray, "4 4 3"] | None = None


def examine(
  source: access.FileSource,
  index: int,
  sample_size: int,
  count_tokens: Callable[[str], int],
  max_tokens: int,
) -> Examined:
  """Reads a record, decodes its picture and counts its captions' tokens."""
  try:
    record = source[index]
    name = source.file_name(index)
  except (OSError, ValueError) as error:
    key = source.keys()[index]
    return Examined(index, key, [Finding("unreadable_record", str(error))])
  result = Examined(index, record.key, [])
  _examine_image(record.image, name, sample_size, result)
  result.findings += _captions(record.captions, count_tokens, max_tokens)
  return result


def crop_loss(size: tuple[int, int], bucket: tuple[int, int]) -> float:
  """Returns the part of a picture's area that covering a bucket cuts off."""
  ratio, goal = size[0] / size[1], bucket[0] / bucket[1]
  return 1 - min(ratio / goal, goal / ratio)


def _examine_image(
  image: bytes, name: str | None, sample_size: int, result: Examined
) -> None:
  try:
    with transforms.opened(image) as picture:
      result.findings += _form(picture, image, name)
    if transforms.is_turned(image):
      result.findings.append(
        Finding("rotated", "EXIF data turn it; training sees it upright")
      )
  except ValueError as error:
    result.findings.append(Finding("unreadable", str(error)))
    return
  try:
    decoded = transforms.decode(image)
  except ValueError as error:
    result.findings.append(Finding("truncated", str(error)))
    return
  height, width = result.size = (decoded.height, decoded.width)
  result.outline = outline(decoded)
  tiny = decoded.resize((4, 4), PIL.Image.Resampling.BOX)
  result.colors = np.asarray(tiny, np.float32)
  bucket = resolution.closest_bin(height / width, sample_size)
  if height * width < bucket[0] * bucket[1]:
    detail = f"{height} x {width}, its bucket is {bucket[0]} x {bucket[1]}"
    result.findings.append(Finding("tiny", detail))
  loss = crop_loss((height, width), bucket)
  if loss > _MOST_CROPPED:
    detail = f"{height} x {width} loses {loss:.0%} in {bucket[0]} x {bucket[1]}"
    result.findings.append(Finding("extreme_aspect", detail))


def outline(picture: PIL.Image.Image) -> bytes:
  """Returns 128 bits that scaling and compressing a picture seldom change."""
  side = _HASH_SIDE + 1
  grey = picture.convert("L").resize((side, side), PIL.Image.Resampling.BOX)
  values: UInt8[np.ndarray, "9 9"] = np.asarray(grey)
  across = values[:-1, 1:] > values[:-1, :-1]
  down = values[1:, :-1] > values[:-1, :-1]
  return np.packbits([across, down]).tobytes()


def _form(
  picture: PIL.Image.Image, image: bytes, name: str | None
) -> list[Finding]:
  found = []
  suffix = posixpath.splitext(name or "")[1].lower()
  if suffix in _FORMATS and picture.format not in _FORMATS[suffix]:
    detail = f"{name} is {picture.format}"
    found.append(Finding("wrong_extension", detail))
  frames = (
    picture.n_frames
    if picture.format in ("GIF", "PNG", "WEBP") and (picture.is_animated)
    else 1
  )
  if frames > 1:
    found.append(Finding("animated", f"{frames} frames, the first is used"))
  elif picture.mode in ("P", "PA"):
    found.append(Finding("palette", f"{picture.format} with a palette"))
  if picture.mode == "CMYK":
    profile = "with" if picture.info.get("icc_profile") else "without"
    found.append(Finding("cmyk", f"{profile} a colour profile"))
  # Pillow reads 16-bit RGB as 8 bits; byte 24 of a PNG says how it is stored.
  deep = picture.format == "PNG" and image[24] == 16
  if deep or picture.mode.startswith(("I", "F")):
    found.append(Finding("sixteen_bit", "more than 8 bits a channel"))
  return found


def _captions(
  captions: Sequence[records.Caption],
  count_tokens: Callable[[str], int],
  max_tokens: int,
) -> list[Finding]:
  if not captions:
    return [Finding("missing_caption", "no caption")]
  found = []
  for caption in captions:
    if not caption.text.strip():
      found.append(Finding("empty_caption", f"{caption.name} is empty"))
    elif (count := count_tokens(caption.text)) > max_tokens:
      detail = f"{caption.name} has {count:,} tokens, {max_tokens} are used"
      found.append(Finding("long_caption", detail))
  return found
