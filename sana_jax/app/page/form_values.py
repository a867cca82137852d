"""From what a form holds to a request, and from an image back to a form."""

import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

import gradio
import numpy as np
import PIL.Image

from sana_jax.app import limits as limits_lib
from sana_jax.app import requests, uploads
from sana_jax.app.errors import InvalidRequestError
from sana_jax.app.page import form

_MAX_SEED = 2**32 - 1
# Of 255: what is painted differs from the white around it by so much at least.
_PAINTED = 96


def to_request(
  values: Mapping[str, Any], limits: limits_lib.Limits
) -> requests.GenerationRequest:
  """Reads a form, as the browser sent it.

  Args:
    values: of the fields, by name; files as they were uploaded.

  Raises:
    InvalidRequestError: a file that is no usable picture.
  """
  chosen = {
    name: _number(values[name])
    for name in ("num_inference_steps", "guidance_scale", "num_images")
  }
  chosen |= _size(values)
  chosen |= _pictures(values, limits)
  chosen |= _control(values, limits)
  chosen |= _adapter(values)
  if "solver" in values:
    chosen["solver"] = values["solver"]
  if values["randomize"] is True:
    seed, index = secrets.randbelow(_MAX_SEED + 1), 0
  else:
    seed, index = _number(values["seed"]), _number(values["image_index"])
  if seed is None:
    raise InvalidRequestError(
      "seed", "There is no seed; give a number, or have a new one every time."
    )
  return requests.GenerationRequest(
    prompt=values["prompt"],
    negative_prompt=values["negative_prompt"] or "",
    seed=seed,
    image_index=0 if index is None else index,
    **chosen,
  )


def start_over(fields: form.Fields) -> dict[Any, Any]:
  """Returns updates that take all messages off the fields."""
  return {
    field: gradio.update(**_info(field, ""), elem_classes=[])
    for field in fields.values()
  }


def refuse(fields: form.Fields, error: InvalidRequestError) -> dict[Any, Any]:
  """Returns the update that says what is wrong with a field."""
  field = fields.get(error.field or "")
  if field is None:
    return {}
  info = _info(field, error.told(form.LABELS))
  return {field: gradio.update(**info, elem_classes=["refused"])}


def _info(field: gradio.components.Component, text: str) -> dict[str, str]:
  """Returns what is beneath a field's label; its own if there is no text.

  All components have the attribute, but pictures take no such argument.
  """
  own = getattr(field, "info", None)
  return {} if own is None else {"info": text or own}


def _size(values: Mapping[str, Any]) -> dict[str, Any]:
  aspect = values["aspect"]
  if aspect == form.AUTOMATIC:
    return {}
  if aspect != form.CUSTOM:
    return {"aspect": aspect}
  size = {name: _number(values[name]) for name in ("width", "height")}
  for name, side in size.items():
    if side is None:
      raise InvalidRequestError(name, f"There is no {name}; give a number.")
  return size


def _pictures(
  values: Mapping[str, Any], limits: limits_lib.Limits
) -> dict[str, Any]:
  """Reads the image and the mask, which is painted or uploaded."""
  drawing = values["image"] or {}
  image = _read(drawing.get("background"), "image", limits)
  mask = _read(values["mask_image"], "mask_image", limits)
  if mask is None:
    layers = [
      _read(layer, "mask_image", limits)
      for layer in drawing.get("layers") or []
    ]
    mask = _painted([layer for layer in layers if layer is not None])
  if image is None:
    if mask is not None:
      raise InvalidRequestError(
        "image", "There is a mask, but no image; upload one, or clear the mask."
      )
    return {}
  strength = _number(values["strength"])
  return {"image": image, "mask_image": mask, "strength": strength}


def _control(
  values: Mapping[str, Any], limits: limits_lib.Limits
) -> dict[str, Any]:
  name = "control_image"
  picture = _read(values.get(name), name, limits)
  if picture is None:  # which a pipeline with a ControlNet refuses
    return {}
  scale = "controlnet_conditioning_scale"
  return {name: picture, scale: _number(values[scale])}


def _painted(layers: list[PIL.Image.Image]) -> PIL.Image.Image | None:
  """Makes a mask of what was painted; None: nothing was.

  Args:
    layers: over white.
  """
  painted = [
    (255 - np.asarray(layer)).max(axis=-1) >= _PAINTED for layer in layers
  ]
  if not any(layer.any() for layer in painted):
    return None
  return PIL.Image.fromarray(np.any(painted, axis=0))


def _read(
  file: Any, field: str, limits: limits_lib.Limits
) -> PIL.Image.Image | None:
  data = upload_bytes(file, field, limits)
  if data is None:
    return None
  return uploads.read_picture(data, limits, field=field)


def upload_bytes(
  file: Any, field: str, limits: limits_lib.Limits
) -> bytes | None:
  """Reads a file that was uploaded, and not more than may be.

  Args:
    file: what Gradio says of it; None: there is none. That its path is of an
      upload was checked by `guard`.

  Raises:
    InvalidRequestError: it is not there any more.
  """
  if not isinstance(file, Mapping) or file.get("path") is None:
    return None
  try:
    with pathlib.Path(file["path"]).open("rb") as stream:
      return stream.read(limits.max_upload_bytes + 1)
  except OSError as error:
    raise InvalidRequestError(
      field, "The uploaded file is not here any more; upload it again."
    ) from error


def _adapter(values: Mapping[str, Any]) -> dict[str, Any]:
  if values.get("lora", form.NONE) == form.NONE:
    return {}
  return {"lora": values["lora"], "lora_scale": _number(values["lora_scale"])}


def _number(value: Any) -> Any:
  """Returns 3 for 3.0: browsers know one kind of numbers only."""
  if isinstance(value, float) and value.is_integer():
    return int(value)
  return value
