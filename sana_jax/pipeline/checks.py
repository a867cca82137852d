"""What users may get wrong, said in one line each."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sana_jax import config
from sana_jax.diffusion import scheduler_config, schedules

_REMEDIES = {
  "text encoder": "load it with dtype=float32, or check its weights",
  "transformer": "load it with dtype=float32, lower guidance_scale, or check "
  "the weights and latents",
  "decoder": "load it with dtype=float32, or check its weights",
}


def check_components(
  text_encoder: config.Gemma2Config,
  transformer: config.SanaConfig,
  autoencoder: config.DCAEConfig,
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
  if problems:
    raise ValueError("The components do not fit: " + "; ".join(problems) + ".")


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


def check_counts(
  seed: int, num_images_per_prompt: int, first_image_index: int
) -> None:
  if not 0 <= seed < 2**32:
    raise ValueError(f"seed must be in [0, 2**32), got {seed}.")
  if num_images_per_prompt < 1:
    raise ValueError(
      f"num_images_per_prompt must be at least 1, got {num_images_per_prompt}."
    )
  if first_image_index < 0:
    raise ValueError(
      f"first_image_index must not be negative, got {first_image_index}."
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
  if height < 1 or width < 1 or height % multiple or width % multiple:
    raise ValueError(
      f"height {height} and width {width} must be positive multiples of "
      f"{multiple}, or use_resolution_binning=True where there are bins."
    )


def check_shape(name: str, array: Any, shape: tuple[int, ...]) -> None:
  if tuple(np.shape(array)) != shape:
    raise ValueError(
      f"{name} has shape {tuple(np.shape(array))}; expected {shape}, channels "
      "last."
    )


def check_finite(stage: str, array: Float[Array, "..."]) -> None:
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
