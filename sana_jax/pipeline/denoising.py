"""From noise to latents: pure functions of a transformer and arrays.

Each works under `jax.jit`. Samples of a batch do not influence each other, so a
batch may be cut over devices.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Real

from sana_jax.diffusion import flow, guidance, samplers, trigflow
from sana_jax.diffusion.schedules import Schedule
from sana_jax.models import controlnet as controlnet_lib
from sana_jax.pipeline import reports
from sana_jax.typing import ConditionalVelocityFn, VelocityFn


class Condition(NamedTuple):
  """What the transformer is told to draw."""

  states: Float[Array, "b l d"]
  mask: Bool[Array, "b l"]


class Known(NamedTuple):
  """What of the picture is given, and stays where `mask` is 0."""

  latents: Float[Array, "b h w c"]
  noise: Float[Array, "b h w c"]
  mask: Float[Array, "b h w 1"]


class Scales(NamedTuple):
  """Strengths of what steers the transformer."""

  guidance: Real[Array, ""]
  pag: Real[Array, ""]
  pag_adaptive: Real[Array, ""]
  controlnet: Real[Array, ""]


class _Inputs(NamedTuple):
  """What the network reads of one branch of the guidance."""

  condition: Condition
  control: Float[Array, "b h w c"] | None
  perturbed: Bool[Array, " b"] | None


def add_noise(
  clean: Float[Array, "b h w c"],
  noise: Float[Array, "b h w c"],
  schedule: Schedule,
  *,
  on_circle: bool,
) -> Float[Array, "b h w c"]:
  """Brings clean latents to the noise level that a schedule begins with.

  Args:
    on_circle: the schedule's timesteps are TrigFlow's angles.
  """
  batch = (clean.shape[0],)
  if on_circle:
    angle = jnp.full(batch, schedule.timesteps[0])
    return trigflow.interpolate(clean, noise, angle)
  return flow.interpolate(clean, noise, jnp.full(batch, schedule.sigmas[0]))


def denoise(
  *,
  transformer: Any,
  schedule: Schedule,
  scales: Scales,
  latents: Float[Array, "b h w c"],
  condition: Condition,
  null_condition: Condition | None = None,
  noise: Float[Array, "b n h w c"] | None = None,
  known: Known | None = None,
  controlnet: Any = None,
  control: Float[Array, "b h w c"] | None = None,
  controlnet_wiring: str = "diffusers",
  timestep_scale: float = 1.0,
  guidance_interval: tuple[float, float] | None = None,
  pag_layers: tuple[int, ...] = (),
  run: Int[Array, ""] | None = None,
  rows: Int[Array, " b"] | None = None,
  trajectory: bool = False,
) -> Any:
  """Samples with a flow model, down to data.

  Args:
    latents: at the schedule's first sigma.
    null_condition: of the negative prompt; None: no classifier-free guidance.
    noise: for stochastic schedules.
    known: for inpainting: after every step, the known part is put back, with
      the noise that belongs to the step's sigma.
    controlnet: a branch that steers the transformer by `control`, the latents
      of the control image; see `controlnet.control_residuals`.
    pag_layers: blocks that perturbed-attention guidance perturbs; none: off.
    run: which is told of every step; see `reports.watch`. None: nobody is.
    rows: numbers of the samples in the whole batch, for `run`.
    trajectory: True returns the parts of a `samplers.Trajectory`, the batch
      axis first.

  Source: blended latents are Avrahami et al., arXiv:2206.02779.
  """

  def velocity_under(inputs: _Inputs) -> VelocityFn:
    return _velocity(
      transformer,
      inputs,
      timestep_scale=timestep_scale,
      identity=_identity(transformer, inputs.perturbed, pag_layers),
      residuals_fn=None
      if controlnet is None
      else _residuals(
        controlnet, transformer, inputs, scales.controlnet, controlnet_wiring
      ),
      residuals_after=controlnet_lib.first_block(controlnet_wiring),
    )

  velocity_fn = _guided(
    velocity_under,
    _Inputs(condition, control, None),
    null_condition,
    scales,
    perturb=bool(pag_layers),
    interval=guidance_interval,
  )
  project_fn = None if known is None else _put_back(known, flow.interpolate)
  return _sample(
    velocity_fn,
    latents,
    schedule,
    noise,
    project_fn,
    report_fn=_report(run, rows, project_fn),
    trajectory=trajectory,
  )


def denoise_sprint(
  *,
  transformer: Any,
  schedule: Schedule,
  scales: Scales,
  latents: Float[Array, "b h w c"],
  condition: Condition,
  noise: Float[Array, "b n h w c"],
  known: Known | None = None,
  sigma_data: float,
  guidance_embeds_scale: float,
  run: Int[Array, ""] | None = None,
  rows: Int[Array, " b"] | None = None,
  trajectory: bool = False,
) -> Any:
  """Samples with a SANA-Sprint model, in units of standard deviation one.

  Args:
    latents: as in `denoise`, like `known`.
    scales: the guidance scale is an input of the network.
    run: as in `denoise`, like `rows`.
    trajectory: as in `denoise`, in the sampler's units (times sigma_data).
  """
  embedded = jnp.full(
    latents.shape[:1], scales.guidance * guidance_embeds_scale, jnp.float32
  )

  text = transformer.encode_text(condition.states)

  def velocity(x, sigma, timestep):
    del sigma
    return transformer(x, timestep, text, condition.mask, guidance=embedded)

  def mix(clean, fresh, sigma):
    angle = trigflow.trig_time(sigma)
    return sigma_data * trigflow.interpolate(clean, fresh, angle)

  prediction_fn = trigflow.prediction_fn(velocity, sigma_data=sigma_data)
  project_fn = None if known is None else _put_back(known, mix)
  result = _sample(
    prediction_fn,
    latents * sigma_data,
    schedule,
    noise,
    project_fn,
    report_fn=_report(run, rows, project_fn, unit=sigma_data),
    trajectory=trajectory,
  )
  return result if trajectory else result / sigma_data


def _velocity(
  transformer: Any,
  inputs: _Inputs,
  *,
  timestep_scale: float,
  identity: Bool[Array, "layers b"] | None,
  residuals_fn: Callable[[Array, Array], Array] | None,
  residuals_after: int,
) -> VelocityFn:
  """Returns the velocity under a condition, whose text is encoded once."""
  text = transformer.encode_text(inputs.condition.states)

  def velocity(x, sigma, timestep):
    del sigma
    timestep = timestep * timestep_scale
    steering = {}
    if residuals_fn is not None:
      steering = {
        "residuals": residuals_fn(x, timestep),
        "residuals_after": residuals_after,
      }
    return transformer(
      x,
      timestep,
      text,
      inputs.condition.mask,
      identity_attention=identity,
      **steering,
    )

  return velocity


def _residuals(
  controlnet: Any,
  transformer: Any,
  inputs: _Inputs,
  scale: Real[Array, ""],
  wiring: str,
) -> Callable[[Array, Array], Array]:
  """Returns what a branch adds, of latents and time; its text encoded once."""
  text = controlnet_lib.encode_text(
    controlnet, transformer, inputs.condition.states, wiring=wiring
  )

  def residuals(x, timestep):
    return controlnet_lib.control_residuals(
      controlnet,
      transformer,
      x,
      inputs.control,
      timestep,
      text,
      inputs.condition.mask,
      conditioning_scale=scale,
      wiring=wiring,
    )

  return residuals


def _guided(
  velocity_under: ConditionalVelocityFn,
  inputs: _Inputs,
  null_condition: Condition | None,
  scales: Scales,
  *,
  perturb: bool,
  interval: tuple[float, float] | None,
) -> VelocityFn:
  """Adds the guidance that is asked for to a conditional velocity."""
  conditional = inputs
  batch = inputs.condition.mask.shape[0]
  if perturb:
    inputs = inputs._replace(perturbed=jnp.zeros((batch,), bool))
  null = None
  if null_condition is not None:
    null = inputs._replace(condition=null_condition)
  if perturb:
    guided = guidance.perturbed_attention(
      velocity_under,
      inputs,
      inputs._replace(perturbed=jnp.ones((batch,), bool)),
      null,
      scale=scales.guidance,
      pag_scale=scales.pag,
      pag_adaptive_scale=scales.pag_adaptive,
    )
  elif null is not None:
    guided = guidance.classifier_free(
      velocity_under, inputs, null, scale=scales.guidance
    )
  else:
    return velocity_under(conditional)
  if interval is None:
    return guided
  return guidance.within(interval, guided, velocity_under(conditional))


def _identity(
  transformer: Any, perturbed: Array | None, layers: tuple[int, ...]
) -> Bool[Array, "layers b"] | None:
  if perturbed is None:
    return None
  depth = jax.tree.leaves(transformer.blocks)[0].shape[0]
  return (
    jnp.asarray(np.isin(np.arange(depth), layers))[:, None] & perturbed[None]
  )


def _put_back(known: Known, mix: Callable[..., Array]) -> samplers.ProjectFn:
  def project(x, sigma):
    given = mix(known.latents, known.noise, sigma)
    return known.mask * x + (1 - known.mask) * given

  return project


def _report(
  run: Int[Array, ""] | None,
  rows: Int[Array, " b"] | None,
  project_fn: samplers.ProjectFn | None,
  *,
  unit: float = 1.0,
) -> samplers.ReportFn | None:
  """Returns what tells `run` of the estimated data, in units of `unit`."""
  if run is None:
    return None

  def report(index, denoised):
    if project_fn is not None:
      denoised = project_fn(denoised, jnp.zeros(denoised.shape[0], jnp.float32))
    return reports.report(run, index, rows, denoised / unit)

  return report


def _sample(
  velocity_fn,
  latents,
  schedule,
  noise,
  project_fn,
  *,
  report_fn: samplers.ReportFn | None,
  trajectory: bool,
):
  options = {
    "noise": None if noise is None else noise.swapaxes(0, 1),
    "project_fn": project_fn,
  }
  if not trajectory:
    return samplers.sample(
      velocity_fn, latents, schedule, report_fn=report_fn, **options
    )
  steps = samplers.sample_trajectory(velocity_fn, latents, schedule, **options)
  return tuple(part.swapaxes(0, 1) for part in steps)
