"""What an image says about itself: written into its PNG, and read back."""

import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any

import jax
import PIL.Image
from etils import epath

from sana_jax import pipeline as pipeline_lib
from sana_jax.bulk import fields, plan, requests

# See `SanaOutput.text_length`.
TEXT_LENGTH = "text_length"
# Another one of these may make another image.
_COMPARED = {
  "checkpoint_sha256": "--checkpoint gives another model",
  "controlnet_sha256": "--controlnet is another",
  "lora_sha256": "--lora is another",
  "solver": "the checkpoint has another sampler",
  "dtype": "--dtype is another",
  "sana_jax": "this is another version of sana_jax",
  "jax": "this is another version of JAX",
  "device": "this is another device",
}


def describe_run(
  pipe: pipeline_lib.SanaPipeline,
  checkpoint: epath.Path,
  hashes: Mapping[str, Any],
  options: Mapping[str, Any],
) -> dict[str, Any]:
  """Collects what, besides its request, determines an image.

  Args:
    hashes: of the weights; see `weight_files.hashes`.
    options: how the pipeline was loaded, "dtype" among them.
  """
  return {
    "solver": type(pipe.solver).__name__,
    **options,
    "checkpoint": checkpoint.absolute().name,
    **hashes,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "sana_jax": importlib.metadata.version("sana_jax"),
  }


def describe_image(
  pipe: pipeline_lib.SanaPipeline,
  image: plan.Image,
  details: Mapping[str, Any],
) -> dict[str, Any]:
  """Collects everything that an image is made from, as JSON values.

  Args:
    details: those of `describe_run`, and the batch_size and text_length that
      the image was made in, which may change the last bit.
  """
  return {
    "prompt": image.prompt,
    "image_index": image.image_index,
    "negative_prompt": image.negative_prompt,
    "seed": image.seed,
    **pipe.generation_config.replace(image.settings).to_dict(),
    **image.pictures,
    **details,
  }


def png_chunks(
  description: Mapping[str, Any], shape: tuple[int, ...]
) -> dict[str, str]:
  """Makes text chunks: JSON, and the line format of other image tools."""
  negative = description["negative_prompt"]
  parameters = [
    description["prompt"],
    *([f"Negative prompt: {negative}"] if negative else []),
    f"Steps: {description['num_inference_steps']}, "
    f"Sampler: {description['solver']}, "
    f"CFG scale: {description['guidance_scale']}, "
    f"Seed: {description['seed']}, Size: {shape[1]}x{shape[0]}, "
    f"Model hash: {description['checkpoint_sha256'][:10]}, "
    f"Model: {description['checkpoint']}, "
    f"Version: sana_jax {description['sana_jax']}",
  ]
  return {
    "parameters": "\n".join(parameters),
    "prompt": description["prompt"],
    "seed": str(description["seed"]),
    "sana_jax": json.dumps(description, ensure_ascii=False),
  }


def read_png(path: epath.PathLike) -> dict[str, Any]:
  """Returns the description that an image carries.

  Raises:
    OSError: there is no such image.
    ValueError: it carries none, or that of several images.
  """
  with epath.Path(path).open("rb") as file, PIL.Image.open(file) as image:
    # Chunks may come after the pixels.
    image.load()
    return read_chunks(image.info, str(path))


def read_chunks(chunks: Mapping[Any, Any], name: str) -> dict[str, Any]:
  """Returns the description among the text chunks of an image.

  Args:
    name: of the image, for messages.

  Raises:
    ValueError: there is none, or that of several images.
  """
  try:
    description = json.loads(chunks.get("sana_jax") or "")
  except (ValueError, TypeError, RecursionError) as error:
    raise ValueError(_undescribed(name)) from error
  if not isinstance(description, dict):
    raise ValueError(_undescribed(name))
  expected = {"prompt", "seed", "image_index", "batch_size"}
  if missing := sorted(expected - set(description)):
    raise ValueError(
      f"{name} does not say its {', '.join(missing)}; it cannot be made again."
    )
  return description


def request_again(
  pipe: pipeline_lib.SanaPipeline, path: str, description: Mapping[str, Any]
) -> requests.Request:
  """Returns the request of an image that was described.

  Raises:
    ValueError: the description says what cannot be.
  """
  own = pipe.generation_config.to_dict()
  # Only what differs: a sampler refuses some settings, at any value.
  settings = {
    name: fields.convert(description[name], kind)
    for name, kind in fields.SETTING_TYPES.items()
    if name in description and not _same(description[name], own[name])
  }
  _leave_out_implied(pipe, settings)
  record = {
    name: fields.convert(description[name], kind)
    for name, kind in fields.REQUEST_TYPES.items()
    if name in description
  }
  return requests.Reader().make(path, 1, record | settings)


def prescribe_text_length(
  pipe: pipeline_lib.SanaPipeline, description: Mapping[str, Any]
) -> None:
  """Has a pipeline pad texts as those of a described image were padded.

  Raises:
    ValueError: the description says what cannot be.
  """
  # Images that do not say it are older than the choice.
  length = description.get(TEXT_LENGTH)
  if length is not None and (type(length) is not int or length < 1):
    raise ValueError(
      f"{TEXT_LENGTH} is {length!r}; expected a positive whole number."
    )
  pipe.text_lengths = () if length is None else (length,)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
  """Says what may keep an image from coming out the same.

  Args:
    there: the image's description.
    here: of the run that makes it again; see `describe_run`.
  """
  return [
    f"{reason}: {name} was {there.get(name)}, is {here.get(name)}"
    for name, reason in _COMPARED.items()
    if there.get(name) != here.get(name)
  ]


def _undescribed(name: str) -> str:
  return (
    f"{name} does not say how it was made: it is not a PNG of sample.py, or "
    "was saved again by another program."
  )


def _leave_out_implied(
  pipe: pipeline_lib.SanaPipeline, settings: dict[str, Any]
) -> None:
  """Removes what follows from the number of steps; see `replace`."""
  name, steps = "intermediate_timesteps", "num_inference_steps"
  given = {steps: settings[steps]} if steps in settings else {}
  implied = getattr(pipe.generation_config.replace(given), name)
  if name in settings and _same(settings[name], implied):
    del settings[name]


def _same(a: Any, b: Any) -> bool:
  # JSON has lists only.
  return json.dumps(a) == json.dumps(b)
