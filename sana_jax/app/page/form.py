"""The form of the page: its fields, with the checkpoint's defaults.

A field is named like what it sets in a `GenerationRequest`, so that what is
wrong with a request can be said beside the field.
"""

import functools
import math
from collections.abc import Collection

import gradio

from sana_jax import pipeline as pipeline_lib
from sana_jax.app import limits as limits_lib
from sana_jax.app import solvers

AUTOMATIC, CUSTOM, NONE = "automatic", "custom", "none"
ASPECTS = ("1:1", "4:3", "3:4", "3:2", "2:3", "16:9", "9:16")
SOLVER_NAMES = {
  "FlowDPMSolver": "Flow-DPM-Solver++",
  "FlowEuler": "Flow-Euler",
}
# What people see of the fields, beside them and in messages.
LABELS = {
  "prompt": "Prompt",
  "negative_prompt": "Negative prompt",
  "aspect": "Size",
  "width": "Width",
  "height": "Height",
  "num_inference_steps": "Steps",
  "guidance_scale": "Guidance",
  "solver": "Solver",
  "seed": "Seed",
  "image_index": "Image number",
  "num_images": "Images",
  "image": "Image",
  "mask_image": "Mask",
  "strength": "Strength",
  "control_image": "ControlNet image",
  "controlnet_conditioning_scale": "ControlNet scale",
  "lora": "LoRA",
  "lora_scale": "LoRA scale",
}
# Those that no sentence has by chance.
_IDENTIFIERS = tuple(name for name in LABELS if "_" in name)
_BRUSH = "#e11d48"

Fields = dict[str, gradio.components.Component]


def in_words(text: str) -> str:
  """Returns a message of the pipeline with fields named as people see them."""
  for name in _IDENTIFIERS:
    text = text.replace(name, LABELS[name])
  return text


def texts(pipe: pipeline_lib.SanaPipeline, limits: limits_lib.Limits) -> Fields:
  """Shows the fields for words."""
  sprint = "SANA-Sprint has no negative branch, so there is nothing to enter."
  return {
    "prompt": gradio.Textbox(
      label=LABELS["prompt"],
      info="",
      placeholder="What to draw",
      lines=2,
      max_lines=6,
      max_length=limits.max_prompt_characters,
      autofocus=True,
      elem_id="prompt",
    ),
    "negative_prompt": gradio.Textbox(
      label=LABELS["negative_prompt"],
      info=sprint if pipe.is_sprint else "What to stay away from",
      lines=1,
      max_lines=4,
      max_length=limits.max_prompt_characters,
      interactive=not pipe.is_sprint,
      elem_id="negative_prompt",
    ),
  }


def presets(pipe: pipeline_lib.SanaPipeline) -> dict[tuple[int, int], str]:
  """Returns aspects by the width and height that they give.

  To a small model some are the same; then it is the one that is nearest.
  """
  found: dict[tuple[int, int], str] = {}

  def distance(sides: tuple[int, int], aspect: str) -> float:
    width, height = map(int, aspect.split(":"))
    return abs(math.log(sides[0] / sides[1] * height / width))

  for aspect in ASPECTS:
    size = pipe.image_size(pipe.generation_config.replace({"aspect": aspect}))
    sides = (size.width, size.height)
    found[sides] = min(
      found.get(sides, aspect), aspect, key=functools.partial(distance, sides)
    )
  return found


def sizes(pipe: pipeline_lib.SanaPipeline) -> tuple[Fields, gradio.Row]:
  """Shows the fields for the size, and the row of width and height, hidden."""
  own = pipe.image_size()
  choices = [
    (f"{aspect} ({width}×{height})", aspect)
    for (width, height), aspect in presets(pipe).items()
  ]
  shape = gradio.Dropdown(
    [("Automatic", AUTOMATIC), *choices, ("Width and height", CUSTOM)],
    value=AUTOMATIC,
    label=LABELS["aspect"],
    info=f"Automatic: {own.width}×{own.height}, or as the image below",
    filterable=False,
    elem_id="aspect",
  )
  with gradio.Row(visible=False) as sides:
    width = gradio.Number(
      own.width,
      label=LABELS["width"],
      info="In pixels",
      precision=0,
      min_width=100,
      elem_id="width",
    )
    height = gradio.Number(
      own.height,
      label=LABELS["height"],
      info="In pixels",
      precision=0,
      min_width=100,
      elem_id="height",
    )
  return {"aspect": shape, "width": width, "height": height}, sides


def sampling(
  pipe: pipeline_lib.SanaPipeline, limits: limits_lib.Limits
) -> Fields:
  """Shows the fields for how an image is sampled."""
  own = pipe.generation_config
  fields: Fields = {
    "num_inference_steps": gradio.Slider(
      1,
      limits.max_steps,
      own.num_inference_steps,
      step=1,
      label=LABELS["num_inference_steps"],
      info="SANA-Sprint is made for 1 to 4" if pipe.is_sprint else "",
      buttons=[],
      elem_id="num_inference_steps",
    ),
    "guidance_scale": gradio.Slider(
      0,
      20,
      own.guidance_scale,
      step=0.1,
      label=LABELS["guidance_scale"],
      info="How closely to follow the prompt"
      + ("; SANA-Sprint was trained with 4 to 5" if pipe.is_sprint else ""),
      buttons=[],
      elem_id="guidance_scale",
    ),
  }
  if len(names := list(solvers.of(pipe.solver))) > 1:
    fields["solver"] = gradio.Radio(
      [(SOLVER_NAMES.get(name, name), name) for name in names],
      value=names[0],
      label=LABELS["solver"],
      info="How steps lead from noise to an image; Euler needs more of them",
      elem_id="solver",
    )
  return fields


def seeds(limits: limits_lib.Limits) -> Fields:
  """Shows the fields for which images, of all that there could be."""
  with gradio.Group():
    with gradio.Row():
      seed = gradio.Number(
        0,
        label=LABELS["seed"],
        info="",
        precision=0,
        min_width=120,
        elem_id="seed",
      )
      index = gradio.Number(
        0,
        label=LABELS["image_index"],
        info="Of those with this seed, from 0",
        precision=0,
        min_width=120,
        elem_id="image_index",
      )
    randomize = gradio.Checkbox(
      True, label="New seed every time", elem_id="randomize"
    )
    count = gradio.Slider(
      1,
      limits.max_images,
      1,
      step=1,
      label=LABELS["num_images"],
      info="",
      buttons=[],
      elem_id="num_images",
    )
  return {
    "seed": seed,
    "image_index": index,
    "randomize": randomize,
    "num_images": count,
  }


def usual_strength(pipe: pipeline_lib.SanaPipeline) -> float:
  """Returns how much of an image is made anew unless somebody says."""
  return 0.5 if pipe.is_sprint else 0.6


def pictures(pipe: pipeline_lib.SanaPipeline) -> Fields:
  """Shows the fields for an image to begin with."""
  return {
    "image": gradio.ImageEditor(
      label=LABELS["image"],
      type="filepath",
      sources=["upload", "clipboard"],
      transforms=(),
      layers=False,
      brush=gradio.Brush(colors=[_BRUSH], color_mode="fixed"),
      format="png",
      height=340,
      buttons=[],
      placeholder="Upload an image\nPaint over what is to be made anew",
      elem_id="image",
    ),
    "mask_image": gradio.Image(
      label=f"{LABELS['mask_image']}, in place of painting: white is made anew",
      type="filepath",
      sources=["upload"],
      height=160,
      buttons=[],
      elem_id="mask_image",
    ),
    "strength": gradio.Slider(
      0.01,
      1,
      usual_strength(pipe),
      step=0.01,
      label=LABELS["strength"],
      info="How much of the image is made anew",
      buttons=[],
      elem_id="strength",
    ),
  }


def control() -> Fields:
  """Shows the fields of a ControlNet."""
  return {
    "control_image": gradio.Image(
      label=f"{LABELS['control_image']}, which it follows",
      type="filepath",
      sources=["upload", "clipboard"],
      height=200,
      buttons=[],
      elem_id="control_image",
    ),
    "controlnet_conditioning_scale": gradio.Slider(
      0,
      2,
      1,
      step=0.05,
      label=LABELS["controlnet_conditioning_scale"],
      info="",
      buttons=[],
      elem_id="controlnet_conditioning_scale",
    ),
  }


def adapters(names: Collection[str]) -> Fields:
  """Shows the fields for adapters, if there are any."""
  if not names:
    return {}
  return {
    "lora": gradio.Dropdown(
      [("None", NONE), *((name, name) for name in sorted(names))],
      value=NONE,
      label=LABELS["lora"],
      info="",
      filterable=False,
      elem_id="lora",
    ),
    "lora_scale": gradio.Slider(
      0,
      2,
      1,
      step=0.05,
      label=LABELS["lora_scale"],
      info="",
      buttons=[],
      elem_id="lora_scale",
    ),
  }
