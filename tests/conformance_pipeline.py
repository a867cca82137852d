"""Pipeline reference cases, computed with the public API.

Each run is made twice: in one call, for the latents and the image, and in
pieces, for all that lies between.
"""

import functools
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import pipeline as pipeline_lib
from sana_jax.models import tiling
from sana_jax.pipeline import denoising, stages

Arrays = dict[str, np.ndarray]

_SETTINGS = (
  "complex_human_instruction",
  "controlnet_conditioning_scale",
  "guidance_scale",
  "height",
  "intermediate_timesteps",
  "max_sequence_length",
  "max_timesteps",
  "num_inference_steps",
  "pag_adaptive_scale",
  "pag_applied_layers",
  "pag_scale",
  "strength",
  "use_resolution_binning",
  "width",
)


def pipeline_case(case: dict, inputs: Arrays, case_dir: pathlib.Path) -> Arrays:
  """Returns every `out.` tensor that `case["tensors"]` names.

  Args:
    case: the contents of case.json.
    inputs: the `in.` tensors, with their prefix.
    case_dir: a checkpoint directory.
  """
  pipe = pipeline_lib.SanaPipeline.from_pretrained(case_dir)
  wanted = {n: t for n, t in case["tensors"].items() if n.startswith("out.")}
  outputs = {}
  shared = _pag_layers(case, pipe.transformer_config.num_layers)
  for run in case["runs"]:
    arguments = _arguments(case["runs"], run)
    if arguments.get("pag_scale"):
      arguments |= shared
    pipe.tiling = _tiling(arguments.pop("vae_tiling", None))
    source = arguments.pop("run")
    size = (arguments["height"], arguments["width"])
    results = _run(pipe, arguments, _tensors(inputs, source, size))
    for name, info in wanted.items():
      if name.startswith(f"out.{run}."):
        value = np.asarray(results[name.removeprefix(f"out.{run}.")])
        outputs[name] = value.astype(info["dtype"])
  return outputs


def _arguments(runs: dict[str, Any], run: str) -> dict[str, Any]:
  arguments = dict(runs[run])
  same = arguments.pop("same call as", None)
  if same is not None:
    arguments = _arguments(runs, same) | arguments
  return {"run": run} | arguments


def _pag_layers(case: dict, num_layers: int) -> dict[str, tuple[int, ...]]:
  """The blocks whose self-attention a case's regular expressions find."""
  patterns = case.get("pag_applied_layers")
  if patterns is None:
    return {}
  found = tuple(
    i
    for i in range(num_layers)
    if any(
      re.search(pattern, f"transformer_blocks.{i}.attn1")
      for pattern in np.atleast_1d(patterns).tolist()
    )
  )
  return {"pag_applied_layers": found}


def _tiling(values: dict[str, int] | None) -> tiling.Tiling | None:
  if values is None:
    return None
  return tiling.Tiling(
    tile_height=values["tile_sample_min_height"],
    tile_width=values["tile_sample_min_width"],
    stride_height=values["tile_sample_stride_height"],
    stride_width=values["tile_sample_stride_width"],
  )


def _tensors(inputs: Arrays, run: str, size) -> dict[str, Any]:
  """Latents, noise and image of a run, channels last."""
  draws = []
  while f"in.{run}.noise.{len(draws)}" in inputs:
    draws.append(_channels_last(inputs[f"in.{run}.noise.{len(draws)}"]))
  tensors = {}
  if f"in.{run}.image" in inputs:
    image = _channels_last(inputs[f"in.{run}.image"])
    tensors["image"] = _nearest(image, *size)
    # The first draw is mixed into the image.
    tensors["latents"] = draws.pop(0)
  else:
    tensors["latents"] = _channels_last(inputs[f"in.{run}.latents"])
  if f"in.{run}.control_image" in inputs:
    # The reference hands tensors in [-1, 1] to the autoencoder as they are.
    control = _channels_last(inputs[f"in.{run}.control_image"])
    tensors["control_image"] = (control + 1) / 2
  if draws:
    tensors["noise"] = np.stack(draws)
  return tensors


def _nearest(image: np.ndarray, height: int, width: int) -> np.ndarray:
  """Scales as the reference does with tensors; files are another matter."""
  rows, columns = (
    np.arange(new) * old // new
    for new, old in zip((height, width), image.shape[1:3], strict=True)
  )
  return image[:, rows][:, :, columns]


def _run(pipe, arguments, tensors) -> dict[str, Any]:
  changes = {k: arguments[k] for k in _SETTINGS if k in arguments}
  if changes.get("complex_human_instruction") == "pipeline default":
    del changes["complex_human_instruction"]
  others = ("negative_prompt", "num_images_per_prompt", "sigmas")
  call = {k: arguments[k] for k in others if k in arguments}
  output = pipe(arguments["prompt"], **call, **tensors, **changes)
  pieces = _pieces(pipe, arguments, changes, tensors)
  return pieces | {
    "image": output.images,
    "latents": _channels_first(output.latents),
  }


def _pieces(pipe, arguments, changes, tensors) -> dict[str, Any]:
  settings = pipe.generation_config.replace(changes)
  schedule = pipe.make_schedule(
    settings,
    sigmas=arguments.get("sigmas"),
    strength=arguments.get("strength", 1.0),
  )
  latents = tensors["latents"]
  control = None
  if "control_image" in tensors:
    control = pipe.encode_image(tensors["control_image"])
    control = jnp.broadcast_to(control, (len(latents), *control.shape[1:]))
  if "image" in tensors:
    clean = pipe.encode_image(tensors["image"])
    latents = denoising.add_noise(
      clean, latents, schedule, on_circle=pipe.is_sprint
    )
  prompts = np.atleast_1d(arguments["prompt"]).tolist()
  condition = pipe.encode_prompt(prompts, settings)
  null = None
  if settings.guidance_scale > 1 and not pipe.is_sprint:
    negatives = np.atleast_1d(arguments.get("negative_prompt", "")).tolist()
    null = pipe.encode_negative_prompt(negatives, condition, settings)
  count = arguments.get("num_images_per_prompt", 1)
  condition, null = jax.tree.map(
    lambda a: jnp.repeat(a, count, axis=0), (condition, null)
  )
  steps = pipe.denoise(
    latents,
    schedule,
    condition,
    null,
    settings,
    noise=tensors.get("noise"),
    control=control,
    trajectory=True,
  )
  latents = steps.samples[-1]
  # The reference records those that image-to-image skips too.
  whole = pipe.make_schedule(settings, sigmas=arguments.get("sigmas"))
  timesteps = whole.timesteps
  if pipe.is_sprint:
    latents = latents / pipe.solver.sigma_data
    timesteps = np.append(timesteps, 0.0)
  decoded = _decode(
    pipe.autoencoder,
    latents,
    pipe.autoencoder_config.scaling_factor,
    pipe.tiling,
  )
  results = {
    "prompt_embeds": condition.states,
    "prompt_attention_mask": condition.mask,
    "step_latents": _channels_first(steps.samples[1:]),
    "timesteps": timesteps,
    "sigmas": schedule.sigmas,
    "decoded": _channels_first(decoded),
  }
  if null is not None:
    results["negative_prompt_embeds"] = null.states
    results["negative_prompt_attention_mask"] = null.mask
  return results


@functools.partial(jax.jit, static_argnums=(2, 3))
def _decode(autoencoder, latents, scaling_factor, tiles):
  return stages.decode_raw(
    autoencoder=autoencoder,
    latents=latents,
    scaling_factor=scaling_factor,
    tiling=tiles,
  )


def _channels_last(array) -> np.ndarray:
  return np.moveaxis(array, -3, -1)


def _channels_first(array) -> np.ndarray:
  return np.moveaxis(np.asarray(array), -1, -3)
