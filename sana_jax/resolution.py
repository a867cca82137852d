"""Resolution bins: the shapes a checkpoint was trained at, and back again."""

import functools
import importlib.resources
import json
import math
import re
from collections.abc import Mapping

import jax
from jaxtyping import Array, Float

# Latent grid of a square image -> how often the 512-pixel table is doubled.
_SCALES = {16: 1, 32: 2, 64: 4, 128: 8}
SAMPLE_SIZES = tuple(_SCALES)
# Pixels per latent of the checkpoints that were trained at these bins.
COMPRESSION = 32
_LANCZOS_SIZES = (2048, 2880)


@functools.cache
def bins(
  sample_size: int, *, training: bool = False
) -> Mapping[float, tuple[int, int]]:
  """Maps height / width to the (height, width) in pixels it is sampled at.

  Args:
    sample_size: of the transformer's config.
    training: True: what it is trained at, which is more at 512 and 1024 pixels.

  Raises:
    ValueError: no published checkpoint has this sample size.
  """
  if sample_size not in _SCALES:
    raise ValueError(
      f"There are no resolution bins for sample_size {sample_size}, only for "
      f"{SAMPLE_SIZES}; pass use_resolution_binning=False."
    )
  asset = importlib.resources.files("sana_jax") / "assets/aspect_ratios.json"
  data = json.loads(asset.read_text(encoding="utf-8"))
  scale = _SCALES[sample_size]
  fewer = scale <= 2 and not training
  left_out = data["sampled_at_2048_and_4096_only"] if fewer else ()
  return {
    ratio: (scale * height, scale * width)
    for ratio, height, width in data["bins_512"]
    if ratio not in left_out
  }


def reference_filter(image_size: int) -> str:
  """Returns the filter that the reference scales training pictures with.

  Args:
    image_size: side of the square, in pixels.

  Source: NVlabs/Sana diffusion/data/datasets/sana_data_multi_scale.py.
  """
  return "lanczos" if image_size in _LANCZOS_SIZES else "bicubic"


def closest_bin(ratio: float, sample_size: int) -> tuple[int, int]:
  """Returns the bin closest to height / width, the flatter one of two."""
  table = bins(sample_size)
  return table[min(table, key=lambda key: abs(key - ratio))]


def parse_aspect(aspect: str) -> float:
  """Returns height / width of "16:9", which is width to height.

  Raises:
    ValueError: something else.
  """
  match = re.fullmatch(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", aspect.strip())
  width, height = (float(side) for side in match.groups()) if match else (0, 0)
  if not width or not height:
    raise ValueError(
      f"aspect must be width to height, such as '16:9', got {aspect!r}."
    )
  return height / width


def same_area(ratio: float, side: int, multiple: int) -> tuple[int, int]:
  """Returns (height, width) with about the area of a square.

  Args:
    ratio: height / width.
    side: of the square, in pixels.
    multiple: what height and width are multiples of.
  """
  stretch = math.sqrt(ratio)
  height, width = (
    max(1, round(length / multiple)) * multiple
    for length in (side * stretch, side / stretch)
  )
  return height, width


def cover_and_crop(
  images: Float[Array, "b h w c"], height: int, width: int
) -> Float[Array, "b {height} {width} c"]:
  """Scales images until they cover (height, width), and crops the centre.

  Bilinear without antialiasing, pixel centres at half-integers; scaled sides
  are truncated to integers, as in the reference pipelines.
  """
  batch, old_height, old_width, channels = images.shape
  if (old_height, old_width) == (height, width):
    return images
  ratio = max(height / old_height, width / old_width)
  # `max`: a product such as 49 * (1 / 49) may truncate to one pixel too few.
  scaled = (
    max(height, int(old_height * ratio)),
    max(width, int(old_width * ratio)),
  )
  images = jax.image.resize(
    images, (batch, *scaled, channels), "linear", antialias=False
  )
  top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
  return images[:, top : top + height, left : left + width]
