"""What the page shows of a job and of a picture, as HTML."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from sana_jax.app.page import form

_PREVIEW_HEIGHT = 380
# In this order; the rest is in the file, for programs.
_SHOWN = (
  *("prompt", "negative_prompt", "size", "seed", "image_index"),
  *("num_inference_steps", "guidance_scale", "solver", "strength"),
  *("controlnet_conditioning_scale", "lora", "lora_scale", "checkpoint"),
)
_LABELS = form.LABELS | {"size": "Size", "checkpoint": "Checkpoint"}


def message(text: str, *, kind: str = "note") -> str:
  """Returns one line; kind "error" is read out at once by screen readers."""
  role = "alert" if kind == "error" else "status"
  return f'<p class="message {kind}" role="{role}">{html.escape(text)}</p>'


def outcome(text: str, warnings: Sequence[str]) -> str:
  """Returns a line, and one for each warning of the pipeline."""
  lines = [message(form.in_words(line), kind="warning") for line in warnings]
  return "".join([message(text), *lines])


def progress(
  text: str,
  done: int = 0,
  total: int = 0,
  preview: UInt8[np.ndarray, "h w 3"] | None = None,
) -> str:
  """Returns a line, a bar if there is a total, and the preview."""
  parts = [message(text)]
  if total:
    parts.append(
      f'<div class="bar" role="progressbar" aria-label="Steps" '
      f'aria-valuemin="0" aria-valuemax="{total}" aria-valuenow="{done}">'
      f'<span style="width: {100 * done / total:.1f}%"></span></div>'
    )
  if preview is not None:
    height, width = preview.shape[:2]
    parts.append(
      f'<img class="preview" alt="Preview after step {done}" '
      f'style="width: min(100%, {_PREVIEW_HEIGHT * width / height:.0f}px)" '
      f'src="{data_uri(preview)}">'
    )
  return "".join(parts)


def data_uri(picture: UInt8[np.ndarray, "h w 3"]) -> str:
  """Returns a picture as an address that holds it."""
  buffer = io.BytesIO()
  PIL.Image.fromarray(picture).save(buffer, "PNG")
  code = base64.b64encode(buffer.getvalue()).decode("ascii")
  return f"data:image/png;base64,{code}"


def settings(description: Mapping[str, Any]) -> str:
  """Returns a list of the settings of an image that tell something."""
  rows = "".join(
    f"<dt>{html.escape(label)}</dt><dd>{html.escape(_text(value))}</dd>"
    for label, value in _readable(description)
  )
  return f'<dl class="settings" aria-label="Settings of the image">{rows}</dl>'


def _readable(description: Mapping[str, Any]) -> list[tuple[str, Any]]:
  width, height = description.get("width"), description.get("height")
  known = dict(description)
  if "control_image" not in known:
    known.pop("controlnet_conditioning_scale", None)
  if width and height:
    known["size"] = f"{width}×{height}"
  if (solver := description.get("solver")) in form.SOLVER_NAMES:
    known["solver"] = form.SOLVER_NAMES[solver]
  return [
    (_LABELS[name], known[name])
    for name in _SHOWN
    if known.get(name) not in (None, "", [])
  ]


def _text(value: Any) -> str:
  if isinstance(value, list):
    return ", ".join(map(str, value))
  return str(value)
