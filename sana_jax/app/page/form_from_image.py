"""From an image that says how it was made back to the form."""

import io
from collections.abc import Collection, Mapping
from typing import Any

import PIL.Image

from sana_jax import pipeline as pipeline_lib
from sana_jax.app import limits as limits_lib
from sana_jax.app import requests, solvers, uploads
from sana_jax.app.errors import InvalidRequestError
from sana_jax.app.page import form
from sana_jax.bulk import metadata

FIELD = "from_image"
_SIZE = ("height", "width", "aspect")
_IN_FORM = ("num_inference_steps", "guidance_scale", "strength")
_OF_CONTROLNET = ("controlnet_conditioning_scale",)


def read(data: bytes, limits: limits_lib.Limits) -> dict[str, Any]:
  """Returns what a PNG says of itself, whoever made it.

  Raises:
    InvalidRequestError: it is no picture, too large, or says nothing.
  """
  uploads.read_picture(data, limits, field=FIELD)  # refuses what is hostile
  with PIL.Image.open(io.BytesIO(data)) as image:
    image.load()  # chunks may come after the pixels
    chunks = dict(image.info)
  try:
    return metadata.read_chunks(chunks, "The image")
  except ValueError as error:
    raise InvalidRequestError(FIELD, str(error)) from error


def read_own(path: str) -> dict[str, Any]:
  """Returns what a file of this server says of itself, however large it is.

  Raises:
    InvalidRequestError: it is not there any more.
  """
  try:
    with PIL.Image.open(path) as image:  # its chunks come before the pixels
      return metadata.read_chunks(dict(image.info), "The image")
  except FileNotFoundError as error:
    raise InvalidRequestError(
      FIELD, "The server does not keep this image any more."
    ) from error


def values(
  description: Mapping[str, Any],
  pipe: pipeline_lib.SanaPipeline,
  loras: Collection[str],
  made_with: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
  """Returns the fields' values, and what keeps the image from coming out again.

  Args:
    description: see `metadata.describe_image`.
    made_with: see `metadata.describe_run`; of this server.

  Raises:
    InvalidRequestError: the description says what cannot be.
  """
  try:
    request = metadata.request_again(pipe, "image", description)
    settings = dict(request.settings)
    size = _size(pipe, {name: settings.pop(name, None) for name in _SIZE})
  except (TypeError, ValueError, OverflowError) as error:
    raise InvalidRequestError(
      FIELD, f"The image's settings cannot be used: {error}"
    ) from error
  own = pipe.generation_config
  found = {
    "prompt": request.prompt,
    "negative_prompt": request.negative_prompt,
    "seed": request.seed,
    "image_index": request.image_index,
    "randomize": False,
    "num_images": 1,
    "strength": form.usual_strength(pipe),
    # What the image was not made from; what it was, may be there already.
    **{name: None for name in requests.PICTURES if name not in description},
    **size,
  }
  in_form = _IN_FORM if pipe.controlnet is None else _IN_FORM + _OF_CONTROLNET
  for name in in_form:
    value = settings.pop(name, getattr(own, name))
    if value is not None:
      found[name] = value
  notes = _foreign(description, made_with)
  chosen, more = _choices(description, pipe, loras)
  notes += more
  if settings:
    notes.append(f"the form has no field for {', '.join(sorted(settings))}")
  return found | chosen, notes


def _size(
  pipe: pipeline_lib.SanaPipeline, given: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the size by the choice that gives it, or by its numbers."""
  size = pipe.image_size(pipe.generation_config.replace(given))
  sides = (size.width, size.height)
  aspect = form.presets(pipe).get(sides, form.CUSTOM)
  return {"aspect": aspect, "width": size.width, "height": size.height}


def _choices(
  description: Mapping[str, Any],
  pipe: pipeline_lib.SanaPipeline,
  loras: Collection[str],
) -> tuple[dict[str, Any], list[str]]:
  """Returns the solver and the adapter, and what this server does not have."""
  found: dict[str, Any] = {}
  notes = []
  names = list(solvers.of(pipe.solver))
  solver = description.get("solver")
  if solver in names and len(names) > 1:
    found["solver"] = solver
  elif solver not in names:
    notes.append(f"this checkpoint has no solver {str(solver)[:40]!r}")
  used, scales = description.get("lora"), description.get("lora_scale")
  if loras:
    found["lora"] = form.NONE
  if used:
    if isinstance(used, list) and len(used) == 1 and used[0] in loras:
      found["lora"] = used[0]
      if isinstance(scales, list) and scales and _is_number(scales[0]):
        found["lora_scale"] = scales[0]
    else:
      notes.append(f"this server does not have its LoRA {str(used)[:80]}")
  return found, notes


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _foreign(
  description: Mapping[str, Any], made_with: Mapping[str, Any]
) -> list[str]:
  notes = [
    f"it was made with another {what}"
    for name, what in (
      ("checkpoint_sha256", "checkpoint"),
      ("dtype", "dtype"),
      ("device", "kind of device"),
    )
    if description.get(name) != made_with.get(name)
  ]
  missing = [
    form.LABELS[name] for name in requests.PICTURES if name in description
  ]
  if missing:
    notes.append(
      "it was made from pictures that it does not contain: add "
      f"{', '.join(missing)}"
    )
  return notes
