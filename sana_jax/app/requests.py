"""What a client may ask for, checked before it is let into the queue."""

import dataclasses
import json
import math
import numbers
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from sana_jax import pipeline as pipeline_lib
from sana_jax.app import solvers
from sana_jax.app.errors import InvalidRequestError
from sana_jax.app.limits import Limits
from sana_jax.bulk import requests as bulk_requests
from sana_jax.bulk import runner
from sana_jax.pipeline import pictures as pictures_lib
from sana_jax.pipeline import sizes

_MAX_SEED = 2**32 - 1
_MAX_SCALE = 100.0
# Categories of Unicode: spaces, controls, formats, and halves of characters.
# Not those that are only unassigned: it may be newer than this Python.
_INVISIBLE = ("Zs", "Zl", "Zp", "Cc", "Cf", "Cs")
# The bins of the published checkpoints end here.
_MAX_RATIO = 4.0
# Of the direction of writing: what is read is not what is there.
_OVERRIDES = "\u202d\u202e"
PICTURES = ("image", "mask_image", "control_image")
# Fields that are settings of the pipeline, under the same names.
_SETTINGS = (
  *("height", "width", "aspect", "num_inference_steps", "guidance_scale"),
  *("pag_scale", "strength", "controlnet_conditioning_scale"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationRequest:
  """One request. None is the checkpoint's own value, wherever it may stand.

  Attributes:
    prompt: what to draw.
    negative_prompt: what to stay away from.
    height: in pixels, as `width`; not together with `aspect`.
    aspect: width to height, such as "16:9".
    num_inference_steps: calls of the transformer.
    guidance_scale: 1 and below: none.
    pag_scale: of perturbed-attention guidance; 0: none.
    solver: one of `solvers.of`.
    seed: None: any.
    num_images: of the same seed, numbered from `image_index`.
    image: to begin with.
    mask_image: white where `image` is made anew.
    control_image: what a ControlNet follows.
    strength: how much of `image` is made anew, in (0, 1].
    controlnet_conditioning_scale: multiplies what a ControlNet adds.
    lora: the name of one of the service's adapters.
    lora_scale: its strength; None: 1.
  """

  prompt: str
  negative_prompt: str = ""
  height: int | None = None
  width: int | None = None
  aspect: str | None = None
  num_inference_steps: int | None = None
  guidance_scale: float | None = None
  pag_scale: float | None = None
  solver: str | None = None
  seed: int | None = None
  num_images: int = 1
  image_index: int = 0
  image: PIL.Image.Image | None = None
  mask_image: PIL.Image.Image | None = None
  control_image: PIL.Image.Image | None = None
  strength: float | None = None
  controlnet_conditioning_scale: float | None = None
  lora: str | None = None
  lora_scale: float | None = None

  def changes(self) -> dict[str, Any]:
    """Returns what it changes of the checkpoint's `GenerationConfig`."""
    values = {name: getattr(self, name) for name in _SETTINGS}
    return {name: v for name, v in values.items() if v is not None}

  def pictures(self) -> dict[str, PIL.Image.Image]:
    """Returns the pictures that there are, by argument of the pipeline."""
    found = {name: getattr(self, name) for name in PICTURES}
    return {name: v for name, v in found.items() if v is not None}

  def settings(self) -> dict[str, Any]:
    """Returns all but the pictures, as JSON values.

    `GenerationRequest(**settings)` asks for the same.
    """
    return {
      field.name: getattr(self, field.name)
      for field in dataclasses.fields(self)
      if field.name not in PICTURES
    }


def from_mapping(values: Mapping[str, Any]) -> GenerationRequest:
  """Makes a request of fields by name.

  Raises:
    InvalidRequestError: an unknown field, or no prompt.
  """
  known = [field.name for field in dataclasses.fields(GenerationRequest)]
  for name in values:
    if name not in known:
      raise InvalidRequestError(
        str(name)[:100],
        f"Unknown field {str(name)[:100]!r}; there are {', '.join(known)}.",
      )
  if "prompt" not in values:
    raise InvalidRequestError("prompt", "There is no prompt; give one.")
  return GenerationRequest(**values)


def check(
  request: GenerationRequest,
  pipe: pipeline_lib.SanaPipeline,
  limits: Limits,
  loras: Collection[str] = (),
) -> GenerationRequest:
  """Returns a request that the pipeline will take, size and steps filled in.

  Pictures are scaled and cropped to what is generated, so that requests that
  wait are small. What is returned passes again, unchanged.

  Args:
    loras: names of the adapters that there are.

  Raises:
    InvalidRequestError: names the field, and says what is expected.
  """
  limits = limits.of(pipe)
  _check_text("prompt", request.prompt, limits)
  # Spaces, and what has no width at all.
  if all(unicodedata.category(c) in _INVISIBLE for c in request.prompt):
    raise InvalidRequestError(
      "prompt", "The prompt is empty; describe what to draw."
    )
  _check_text("negative_prompt", request.negative_prompt, limits)
  _whole("num_images", request.num_images, 1, limits.max_images)
  _whole("image_index", request.image_index, 0, _MAX_SEED - limits.max_images)
  _whole("seed", request.seed, 0, _MAX_SEED)
  _whole(
    "num_inference_steps", request.num_inference_steps, 1, limits.max_steps
  )
  for name in (
    *("guidance_scale", "pag_scale", "controlnet_conditioning_scale"),
  ):
    _number(name, getattr(request, name), 0.0, _MAX_SCALE)
  _number("strength", request.strength, 0.0, 1.0)
  _number("lora_scale", request.lora_scale, -_MAX_SCALE, _MAX_SCALE)
  _check_names(request, pipe, loras)
  _check_control(request, pipe)
  _check_pictures(request, limits)
  _check_size_fields(request, limits)
  size = _resolve(request, pipe)
  _check_area(request, size, limits)
  settings = pipe.generation_config.replace(request.changes())
  fitted = _fitted(request, size)
  _check_mask(fitted, size)
  return dataclasses.replace(
    request,
    **fitted,
    height=size.height,
    width=size.width,
    aspect=None,
    num_inference_steps=settings.num_inference_steps,
    guidance_scale=settings.guidance_scale,
    solver=request.solver or type(pipe.solver).__name__,
  )


def _check_text(name: str, text: Any, limits: Limits) -> None:
  if not isinstance(text, str):
    raise InvalidRequestError(
      name, f"{name} must be a text, got {spelled(text)}."
    )
  if len(text) > limits.max_prompt_characters:
    raise InvalidRequestError(
      name,
      f"{name} has {len(text)} characters; at most "
      f"{limits.max_prompt_characters} are allowed. Shorten it.",
    )
  for place, character in enumerate(text):
    # Control characters, and halves of surrogate pairs; not line breaks.
    refused = unicodedata.category(character) in ("Cc", "Cs")
    if refused and character not in "\t\n\r" or character in _OVERRIDES:
      raise InvalidRequestError(
        name,
        f"{name} has the control character U+{ord(character):04X} at position "
        f"{place}; remove it.",
      )


def _whole(name: str, value: Any, low: int, high: int) -> None:
  if value is None and name not in ("num_images", "image_index"):
    return
  if not isinstance(value, int) or isinstance(value, bool):
    raise InvalidRequestError(
      name, f"{name} must be a whole number, got {spelled(value)}."
    )
  if not low <= value <= high:
    raise InvalidRequestError(
      name, f"{name} must be from {low} to {high}, got {spelled(value)}."
    )


def _number(name: str, value: Any, low: float, high: float) -> None:
  if value is None:
    return
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  # Python compares whole numbers of any size, but not all fit a float.
  if not real or not low <= value <= high or not math.isfinite(value):
    raise InvalidRequestError(
      name,
      f"{name} must be a number from {low:g} to {high:g}, got "
      f"{spelled(value)}.",
    )


def _check_names(
  request: GenerationRequest,
  pipe: pipeline_lib.SanaPipeline,
  loras: Collection[str],
) -> None:
  for name, known in (("solver", solvers.of(pipe.solver)), ("lora", loras)):
    value = getattr(request, name)
    if value is not None and (not isinstance(value, str) or value not in known):
      if not known:
        raise InvalidRequestError(
          name, f"There are no adapters here; leave {name} out."
        )
      raise InvalidRequestError(
        name,
        f"{name} must be one of {', '.join(sorted(known))}, got "
        f"{spelled(value)}.",
      )
  if request.lora_scale is not None and request.lora is None:
    raise InvalidRequestError(
      "lora_scale", "lora_scale has no effect without lora; name one."
    )


def no_controlnet(name: str) -> InvalidRequestError:
  """Returns what a picture is answered that no ControlNet would follow."""
  return InvalidRequestError(
    name, f"{name} cannot be used: there is no ControlNet here; leave it out."
  )


def _check_control(
  request: GenerationRequest, pipe: pipeline_lib.SanaPipeline
) -> None:
  """Says what `pipeline.checks` does, to those who have no pipeline."""
  name = "control_image"
  if pipe.controlnet is None and request.control_image is not None:
    raise no_controlnet(name)
  if pipe.controlnet is not None and request.control_image is None:
    raise InvalidRequestError(
      name,
      f"{name} is missing: images are made with a ControlNet here, which needs "
      "one to follow; add it.",
    )


def _check_pictures(request: GenerationRequest, limits: Limits) -> None:
  for name, picture in request.pictures().items():
    if not isinstance(picture, PIL.Image.Image):
      raise InvalidRequestError(
        name, f"{name} must be a picture, got {type(picture).__name__}."
      )
    if picture.width * picture.height > limits.max_upload_pixels:
      raise InvalidRequestError(
        name,
        f"{name} has {picture.width}x{picture.height} pixels; at most "
        f"{limits.max_upload_pixels} are allowed. Scale it down.",
      )
  image, mask = request.image, request.mask_image
  if image is not None and mask is not None and image.size != mask.size:
    raise InvalidRequestError(
      "mask_image",
      f"mask_image is {mask.width}x{mask.height} pixels, and the image "
      f"{image.width}x{image.height}; they must have the same size.",
    )


def _fitted(
  request: GenerationRequest, size: sizes.ImageSize
) -> dict[str, PIL.Image.Image]:
  """Does to the pictures what the pipeline would do."""
  height, width = size.generated
  return {
    name: PIL.ImageOps.fit(
      picture.convert("L" if name == "mask_image" else "RGB"),
      (width, height),
      PIL.Image.Resampling.LANCZOS,
    )
    for name, picture in request.pictures().items()
  }


def _check_mask(
  fitted: Mapping[str, PIL.Image.Image], size: sizes.ImageSize
) -> None:
  """Says what `pipeline.starts` does, to those who know of no latents."""
  if not fitted.keys() >= {"image", "mask_image"}:
    return
  mask = pictures_lib.read_mask(
    fitted["mask_image"], fitted["image"], *size.generated
  )
  if not np.any(pictures_lib.latent_mask(mask, *size.grid)):
    side = size.compression
    raise InvalidRequestError(
      "mask_image",
      "mask_image is too small: nowhere does it cover half of a square of "
      f"{side}x{side} pixels of the image that is made. Cover more of it; in a "
      "mask that is a picture, white is what is made anew.",
    )


def _check_size_fields(request: GenerationRequest, limits: Limits) -> None:
  for name in ("height", "width"):
    _whole(name, getattr(request, name), 1, limits.max_pixels)
  aspect = request.aspect
  if aspect is None:
    return
  if not isinstance(aspect, str) or len(aspect) > 32:
    raise InvalidRequestError(
      "aspect", f"aspect must be like '16:9', got {spelled(aspect)}."
    )
  if request.height is not None or request.width is not None:
    raise InvalidRequestError(
      "aspect", "aspect cannot go with height or width; give one or the other."
    )


def _resolve(
  request: GenerationRequest, pipe: pipeline_lib.SanaPipeline
) -> sizes.ImageSize:
  """Works the size out, and has the pipeline refuse what it would not make."""
  pictures = request.pictures()
  asked = bulk_requests.Request(
    "request",
    1,
    request.prompt,
    request.negative_prompt,
    settings=tuple(sorted(request.changes().items())),
    pictures=tuple((name, name) for name in sorted(pictures)),
  )
  shown = request.image or request.control_image
  ratio = None if shown is None else shown.height / shown.width
  try:
    settings = runner.resolve_settings(pipe, asked, ratio)
    return pipe.image_size(
      pipe.generation_config.replace(dict(settings)), ratio=ratio
    )
  except (TypeError, ValueError, OverflowError) as error:
    message = str(error)
    names = [field.name for field in dataclasses.fields(request)]
    first = message.split(" ", 1)[0].strip(",")
    raise InvalidRequestError(
      first if first in names else None, message
    ) from error


def _check_area(
  request: GenerationRequest, size: sizes.ImageSize, limits: Limits
) -> None:
  field = "height" if request.aspect is None else "aspect"
  height, width = size.height, size.width
  if height * width > limits.max_pixels:
    raise InvalidRequestError(
      field,
      f"An image of width {width} and height {height} has {height * width} "
      f"pixels; at most {limits.max_pixels} are allowed. Make it smaller.",
    )
  if max(height, width) > _MAX_RATIO * min(height, width):
    raise InvalidRequestError(
      field,
      f"Of an image's width, here {width}, and height, here {height}, one may "
      f"be at most {_MAX_RATIO:g} times the other.",
    )


def spelled(value: Any) -> str:
  """Returns a value for a message: as in JSON, and short."""
  # A number of a million digits must not become a text.
  if isinstance(value, int) and abs(value) >= 10**20:
    return "a number of more than 20 digits"
  try:
    # JSON would escape all other alphabets of a text, and has no NaN.
    text = (
      repr(value)
      if isinstance(value, str | float)
      else json.dumps(value, allow_nan=False)
    )
  except RecursionError:
    return "a value that is nested deeply"
  except (TypeError, ValueError):  # from Python, where even repr may raise
    return f"a value of type {type(value).__name__}"
  return text if len(text) <= 80 else f"{text[:80]}..."
