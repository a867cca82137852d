"""What users may get wrong, said in one line each."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from sana_jax import config, notices
from sana_jax.diffusion import scheduler_config, schedules
from sana_jax.pipeline import options

_REMEDIES = {
  "text encoder": "load it with dtype=float32, or check its weights",
  "transformer": "load it with dtype=float32, lower guidance_scale, or check "
  "the weights and latents",
  "encoder": "load it with dtype=float32, or check its weights and the image",
  "decoder": "load it with dtype=float32, or check its weights",
}


def check_components(
  text_encoder: config.Gemma2Config,
  transformer: config.SanaConfig,
  autoencoder: config.DCAEConfig,
  controlnet: config.SanaControlNetConfig | None,
  *,
  is_sprint: bool,
) -> None:
  """Raises ValueError when components do not belong together."""
  problems = []
  if transformer.caption_channels != text_encoder.hidden_size:
    problems.append(
      f"the transformer reads texts of width {transformer.caption_channels}, "
      f"the text encoder's have {text_encoder.hidden_size}"
    )
  if transformer.in_channels != autoencoder.latent_channels:
    problems.append(
      f"the transformer has {transformer.in_channels} latent channels, the "
      f"autoencoder {autoencoder.latent_channels}"
    )
  if transformer.guidance_embeds != is_sprint:
    problems.append(
      f"guidance_embeds is {transformer.guidance_embeds}, but the scheduler is "
      f"{'' if is_sprint else 'not '}the one of SANA-Sprint"
    )
  if controlnet is not None:
    problems += _misfits(controlnet, transformer, is_sprint=is_sprint)
  if problems:
    raise ValueError("The components do not fit: " + "; ".join(problems) + ".")


def _misfits(
  controlnet: config.SanaControlNetConfig,
  transformer: config.SanaConfig,
  *,
  is_sprint: bool,
) -> list[str]:
  problems = [
    f"the ControlNet has {name} {getattr(controlnet, name)}, the transformer "
    f"{getattr(transformer, name)}"
    for name in ("width", "in_channels", "caption_channels", "patch_size")
    if getattr(controlnet, name) != getattr(transformer, name)
  ]
  if is_sprint:
    problems.append("a ControlNet cannot steer SANA-Sprint")
  return problems


def prompt_list(prompt: Any) -> list[str]:
  """Returns the prompts; raises ValueError if there are none or empty ones."""
  prompts = [prompt] if isinstance(prompt, str) else list(prompt)
  if not prompts:
    raise ValueError("prompt is an empty list; give at least one prompt.")
  for i, text in enumerate(prompts):
    if not isinstance(text, str):
      raise ValueError(f"prompt {i} is {text!r}; expected a string.")
    if not text.strip():
      raise ValueError(f"prompt {i} is empty; describe what to draw.")
  return prompts


def negative_prompt_list(
  prompt: str | Sequence[str], count: int, *, is_sprint: bool
) -> list[str]:
  """Returns one negative prompt, or one for each of `count` prompts."""
  prompts = [prompt] if isinstance(prompt, str) else list(prompt)
  if is_sprint and any(prompts):
    raise ValueError(
      "negative_prompt cannot be used: SANA-Sprint has no negative branch."
    )
  if len(prompts) not in (1, count):
    raise ValueError(
      f"There are {len(prompts)} negative prompts for {count} prompts; give "
      "one for all or one for each."
    )
  return prompts


def image_count(prompts: Sequence[str], num_images_per_prompt: int) -> int:
  """Returns the number of images; raises ValueError when it cannot be."""
  if num_images_per_prompt < 1:
    raise ValueError(
      f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}."
    )
  return len(prompts) * num_images_per_prompt


def image_numbers(
  seed: int | Sequence[int], image_index: int | Sequence[int], count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the seed and the number of each of `count` images.

  Raises:
    ValueError: a number out of range, or another count of them.
  """
  seeds = np.full(count, seed) if np.ndim(seed) == 0 else np.asarray(seed)
  indices = (
    image_index + np.arange(count)
    if np.ndim(image_index) == 0
    else np.asarray(image_index)
  )
  for name, numbers in (("seed", seeds), ("image_index", indices)):
    if numbers.shape != (count,):
      raise ValueError(
        f"{name} has shape {numbers.shape} for {count} images; give one number "
        "for all or one for each."
      )
    if numbers.dtype.kind not in "iu":
      raise ValueError(f"{name} must be whole numbers, got {numbers.tolist()}.")
    if numbers.min() < 0 or numbers.max() >= 2**32:
      raise ValueError(
        f"{name} must be in [0, 2**32), got {numbers.min()} to {numbers.max()}."
      )
  return seeds, indices


def check_effective(
  changes: Mapping[str, Any],
  settings: options.GenerationConfig,
  negative_prompts: Sequence[str],
  pictures: tuple[Any, Any, Any],
) -> None:
  """Raises ValueError for what a call sets but would not use.

  Args:
    pictures: image, mask_image and control_image, None where there is none.
  """
  image, mask_image, control_image = pictures
  guided = settings.guidance_scale > 1
  unused = {
    "mask_image": mask_image is not None
    and image is None
    and "there is no image",
    "strength": image is None and "there is no image",
    "composite_pixels": mask_image is None and "there is no mask_image",
    "controlnet_conditioning_scale": control_image is None
    and "there is no control_image",
    "pag_applied_layers": not settings.pag_scale and "pag_scale is 0",
    "pag_adaptive_scale": not settings.pag_scale and "pag_scale is 0",
    "guidance_interval": not guided
    and not settings.pag_scale
    and "guidance is off (guidance_scale is at most 1)",
    "null_mask": not guided and "guidance_scale is at most 1",
  }
  given = {name for name, value in changes.items() if value is not None}
  if mask_image is not None:
    given.add("mask_image")
  problems = [
    f"{name} has no effect: {unused[name]}"
    for name in sorted(given)
    if unused.get(name)
  ]
  if any(negative_prompts) and not guided:
    problems.append(
      "negative_prompt has no effect: guidance_scale is at most 1"
    )
  if problems:
    raise ValueError("; ".join(problems) + ".")


def check_control(controlnet: Any, control_image: Any) -> None:
  """Raises ValueError when one of the two is missing."""
  if controlnet is not None and control_image is None:
    raise ValueError(
      "control_image is missing: this pipeline has a ControlNet, which needs "
      "one; without, use the checkpoint alone (pipeline.controlnet = None)."
    )
  if controlnet is None and control_image is not None:
    raise ValueError(
      "control_image cannot be used: the pipeline has no ControlNet; give it "
      "one (--controlnet, or components.load_controlnet)."
    )


def warn_if_untrained(
  settings: options.GenerationConfig,
  grid: tuple[int, int],
  transformer: config.SanaConfig,
  *,
  compression: int,
  is_sprint: bool,
) -> None:
  """Warns of settings that a checkpoint was not made for.

  Args:
    grid: of the latents, (height, width).
    compression: pixels of a side of a latent.
  """
  steps, scale = settings.num_inference_steps, settings.guidance_scale
  doubts = []
  if is_sprint and not 1 <= steps <= 4:
    doubts.append(
      f"num_inference_steps {steps} (SANA-Sprint is made for 1 to 4)"
    )
  if is_sprint and not 4 <= scale <= 5:
    doubts.append(
      f"guidance_scale {scale} (SANA-Sprint was trained with 4, 4.5 and 5)"
    )
  if not is_sprint and scale > 10:
    doubts.append(f"guidance_scale {scale} (more than 10 burns colours)")
  area = grid[0] * grid[1] / transformer.sample_size**2
  if not 0.5 <= area <= 2:
    height, width, own = (
      compression * side for side in (*grid, transformer.sample_size)
    )
    doubts.append(
      f"{width}x{height} pixels (this checkpoint was trained around "
      f"{own}x{own})"
    )
  if doubts:
    notices.warn(
      f"Outside the trained range: {'; '.join(doubts)}.", stacklevel=3
    )


def check_custom_times(
  solver: scheduler_config.Solver,
  changes: Mapping[str, Any],
  sigmas: Sequence[float] | None,
  timesteps: Sequence[float] | None,
) -> None:
  """Raises ValueError for times that the solver cannot step through."""
  name = type(solver).__name__
  if sigmas is not None and not isinstance(solver, schedules.FlowEuler):
    raise ValueError(f"sigmas are for the FlowEuler solver, this is {name}.")
  if timesteps is not None and not isinstance(solver, schedules.SCM):
    raise ValueError(f"timesteps are for the SCM solver, this is {name}.")
  if sigmas is None and timesteps is None:
    return
  fixed = {"num_inference_steps", "max_timesteps", "intermediate_timesteps"}
  given = {key for key, value in changes.items() if value is not None}
  if both := sorted(fixed & given):
    raise ValueError(f"{', '.join(both)} cannot go with custom times.")


def check_size(height: int, width: int, multiple: int) -> None:
  """Raises ValueError that names the side, and the nearest it could be."""
  for name, side in (("height", height), ("width", width)):
    if side < 1 or side % multiple:
      low = max(side // multiple, 1) * multiple
      raise ValueError(
        f"{name} {side} must be a positive multiple of {multiple}, such as "
        f"{low} or {low + multiple}."
      )


def check_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
  if tuple(np.shape(array)) != shape:
    raise ValueError(
      f"{name} has shape {tuple(np.shape(array))}; expected {shape}, channels "
      "last."
    )


def check_finite(stage: str, array: Float[ArrayLike, "..."]) -> None:
  """Raises FloatingPointError naming the stage."""
  if not bool(jnp.isfinite(array).all()):
    raise FloatingPointError(
      f"The {stage}'s result is not finite; {_REMEDIES[stage]}."
    )


def check_steps_finite(
  samples: Float[Array, "states b h w c"], schedule: schedules.Schedule
) -> None:
  """Raises FloatingPointError naming the first broken step."""
  finite = np.asarray(jnp.isfinite(samples).all(axis=(1, 2, 3, 4)))
  if finite.all():
    return
  broken = int(np.argmin(finite))
  where = (
    "The initial latents are"
    if broken == 0
    else f"The transformer's result at step {broken} of {schedule.num_steps} "
    f"(sigma {schedule.sigmas[broken - 1]:.3f}) is"
  )
  raise FloatingPointError(f"{where} not finite; {_REMEDIES['transformer']}.")
