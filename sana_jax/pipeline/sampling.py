"""Runs the denoising of a pipeline's batch, and watches over it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from sana_jax.diffusion import samplers, schedules
from sana_jax.pipeline import checks, denoising, execution, options, reports

if TYPE_CHECKING:
  from sana_jax.pipeline.text_to_image import SanaPipeline


class Inputs(NamedTuple):
  """What there is of every image; None: not used."""

  latents: Float[ArrayLike, "b h w c"]
  condition: denoising.Condition
  null_condition: denoising.Condition | None = None
  noise: Float[ArrayLike, "steps b h w c"] | None = None
  known: denoising.Known | None = None
  control: Float[ArrayLike, "b h w c"] | None = None


def sample(
  executor: execution.Executor,
  pipe: "SanaPipeline",
  inputs: Inputs,
  schedule: schedules.Schedule,
  settings: options.GenerationConfig,
  *,
  trajectory: bool,
  progress: execution.ProgressFn | None,
  on_step: reports.StepFn | None = None,
) -> Float[Array, "b h w c"] | samplers.Trajectory:
  """Runs the sampler; `SanaPipeline.denoise` describes it.

  Raises:
    FloatingPointError: the latents are not finite; names the step.
  """
  shared = {
    "transformer": pipe.transformer,
    "schedule": schedule,
    "scales": _scales(settings),
  }
  batched = {k: v for k, v in inputs._asdict().items() if v is not None}
  if inputs.control is not None:
    shared["controlnet"] = pipe.controlnet
  if inputs.noise is not None:
    batched["noise"] = jnp.swapaxes(inputs.noise, 0, 1)
  function, static = _program(pipe, settings)

  def run(watching: reports.Watching | None = None, **changes) -> Any:
    told = ({}, {}) if watching is None else watching
    return executor.run(
      "transformer",
      function,
      shared=shared | told[0],
      batched=batched | told[1],
      static=static | changes,
      progress=progress,
    )

  def run_trajectory() -> samplers.Trajectory:
    steps = run(trajectory=True)
    steps = samplers.Trajectory(*(part.swapaxes(0, 1) for part in steps))
    checks.check_steps_finite(steps.samples, schedule)
    return steps

  if trajectory:
    return run_trajectory()
  if on_step is None:
    result = run()
  else:
    shape = np.shape(inputs.latents)
    with reports.watch(on_step, schedule.num_steps, shape) as watching:
      result = run(watching)
  if not bool(jnp.isfinite(result).all()):
    run_trajectory()  # to say which step broke
    checks.check_finite("transformer", result)
  return result


def _scales(settings: options.GenerationConfig) -> denoising.Scales:
  return denoising.Scales(
    guidance=np.float32(settings.guidance_scale),
    pag=np.float32(settings.pag_scale),
    pag_adaptive=np.float32(settings.pag_adaptive_scale),
    controlnet=np.float32(settings.controlnet_conditioning_scale),
  )


def _program(
  pipe: "SanaPipeline", settings: options.GenerationConfig
) -> tuple[Callable[..., Any], dict[str, Any]]:
  """Returns what is compiled, and its static settings."""
  config = pipe.transformer_config
  if pipe.is_sprint:
    return denoising.denoise_sprint, {
      "sigma_data": pipe.solver.sigma_data,
      "guidance_embeds_scale": config.guidance_embeds_scale,
    }
  return denoising.denoise, {
    "timestep_scale": config.timestep_scale,
    "guidance_interval": settings.guidance_interval,
    "pag_layers": options.pag_layers(settings, config.num_layers),
    "controlnet_wiring": pipe.controlnet_wiring,
  }
