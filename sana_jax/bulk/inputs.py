"""Pictures that requests name: image-to-image, inpainting, ControlNet."""

import functools
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from etils import epath
from jaxtyping import Float

from sana_jax.pipeline import pictures

# Names of a call's arguments, and of a request's fields that hold a path.
NAMES = ("image", "mask_image", "control_image")


class UnusablePictureError(ValueError):
  """A picture that cannot be read, or does not fit."""


class Loaded(NamedTuple):
  """The pictures of a batch.

  Attributes:
    arrays: one for each argument of the call, a row an image.
    digests: SHA-256 of the files of each image, under names like
      "image_sha256".
  """

  arrays: Mapping[str, Float[np.ndarray, "n height width c"]]
  digests: Sequence[Mapping[str, str]]


def ratio(paths: Mapping[str, str]) -> float | None:
  """Returns height / width of the image, or the control image; None: neither.

  Reads the pictures' headers only.

  Raises:
    ValueError: one cannot be read, or the mask does not fit the image.
  """
  headers = {name: _header(path) for name, path in paths.items()}
  if headers.keys() >= {"image", "mask_image"} and (
    headers["image"] != headers["mask_image"]
  ):
    raise ValueError(
      f"mask_image {paths['mask_image']} is not as large as image "
      f"{paths['image']}"
    )
  for name in ("image", "control_image"):
    if name in headers:
      return headers[name][0]
  return None


def load(paths: Sequence[Mapping[str, str]], size: tuple[int, int]) -> Loaded:
  """Reads the pictures of a batch, those of the same path once.

  Args:
    paths: by name; the same names for each image.
    size: height and width to be generated.

  Raises:
    UnusablePictureError: one cannot be read, or does not fit.
  """

  @functools.cache
  def content(path: str) -> bytes:
    return epath.Path(path).read_bytes()

  @functools.cache
  def read(name: str, path: str, image: str | None) -> np.ndarray:
    try:
      picture = PIL.Image.open(io.BytesIO(content(path)))
      if name != "mask_image":
        return pictures.read_image(picture, *size, name=name)
      shown = PIL.Image.open(io.BytesIO(content(image)))
      return pictures.read_mask(picture, shown, *size)
    except (OSError, ValueError) as error:
      raise UnusablePictureError(f"{name} {path}: {error}") from error

  arrays = {
    name: np.concatenate(
      [read(name, each[name], each.get("image")) for each in paths]
    )
    for name in paths[0]
  }
  digests = [
    {
      f"{name}_sha256": hashlib.sha256(content(path)).hexdigest()
      for name, path in each.items()
    }
    for each in paths
  ]
  return Loaded(arrays, digests)


def changed(description: Mapping[str, Any]) -> list[str]:
  """Names the pictures of a described image that are other ones by now.

  Raises:
    OSError: one is not there.
  """
  return [
    f"{description[name]} has changed since"
    for name in NAMES
    if name in description
    and hashlib.sha256(epath.Path(description[name]).read_bytes()).hexdigest()
    != description[f"{name}_sha256"]
  ]


def _header(path: str) -> tuple[float, list[int]]:
  """Returns height / width, and both sides whichever way up it is stored."""
  try:
    with epath.Path(path).open("rb") as file, PIL.Image.open(file) as picture:
      return pictures.aspect_ratio(picture), sorted(picture.size)
  except OSError as error:
    raise ValueError(f"cannot read {path}: {error}") from error
