"""What is wrong with one record."""

import dataclasses
import posixpath
from collections.abc import Callable, Sequence

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from sana_jax.data import records, scan, transforms
from sana_jax.data.sources import access

_HASH_SIDE = 8
# Of 255; a JPEG of one colour has no less noise than none.
_MOST_SPREAD = 1
_FORMATS = {
  **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), ("JPEG", "MPO")),
  **dict.fromkeys((".tif", ".tiff"), ("TIFF",)),
  **dict.fromkeys((".png", ".apng"), ("PNG",)),
  **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), ("PPM",)),
  **dict.fromkeys((".jp2", ".j2k"), ("JPEG2000",)),
  **dict.fromkeys((".bmp", ".dib"), ("BMP", "DIB")),
  ".webp": ("WEBP",),
  ".gif": ("GIF",),
  ".avif": ("AVIF",),
  ".tga": ("TGA",),
  ".qoi": ("QOI",),
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
    counted: whether training plans with it, having read its header and score.
    outline: signs of differences between neighbouring pixels of a tiny copy.
    colors: a tinier copy.
  """

  index: int
  key: str
  findings: list[Finding]
  size: tuple[int, int] | None = None
  counted: bool = True
  outline: bytes = b""
  colors: Float[np.ndarray, "4 4 3"] | None = None

  @property
  def used(self) -> bool:
    """Whether training sees it, once what is broken is left out."""
    return self.size is not None and self.counted


def examine(
  source: access.FileSource,
  index: int,
  count_tokens: Callable[[str], int],
  max_tokens: int,
  min_clip_score: float,
) -> Examined:
  """Reads a record, decodes its picture and counts its captions' tokens."""
  result = _examine(source, index, count_tokens, max_tokens)
  if result.size is None or min_clip_score:
    problem = scan.problem(source, index, min_clip_score)
    result.counted = problem is None
    if result.size is not None and problem is not None:
      result.findings.append(Finding("low_score", problem))
  return result


def _examine(
  source: access.FileSource,
  index: int,
  count_tokens: Callable[[str], int],
  max_tokens: int,
) -> Examined:
  try:
    record = source[index]
    name = source.file_name(index)
  except (OSError, ValueError) as error:
    finding = Finding("unreadable_record", str(error))
    return Examined(index, source.key(index), [finding])
  result = Examined(index, record.key, [])
  _examine_image(record.image, name, result)
  result.findings += _captions(record.captions, count_tokens, max_tokens)
  return result


def _examine_image(image: bytes, name: str | None, result: Examined) -> None:
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
  result.size = (decoded.height, decoded.width)
  result.outline = outline(decoded)
  tiny = decoded.resize((4, 4), PIL.Image.Resampling.BOX)
  result.colors = np.asarray(tiny, np.float32)
  result.findings += _content(image, decoded)


def _content(image: bytes, decoded: PIL.Image.Image) -> list[Finding]:
  """Finds pictures on which there is nothing to see."""
  extrema = decoded.getextrema()
  if any(high - low > _MOST_SPREAD for low, high in extrema):
    return []
  with transforms.opened(image) as picture:
    if picture.has_transparency_data:
      _, most = picture.convert("RGBA").getchannel("A").getextrema()
      if not most:
        return [Finding("transparent", "all of it; trained on as white")]
  color = tuple(high for _, high in extrema)
  return [Finding("single_color", f"all of it is {color} of 255")]


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
