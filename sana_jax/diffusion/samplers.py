"""Sampling: one loop, from noise to data, that any schedule drives."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sana_jax.diffusion import schedules
from sana_jax.typing import VelocityFn

# (sample "b ...", sigma "b" of that sample) -> the sample to go on with.
ProjectFn: TypeAlias = Callable[[Array, Array], Array]
# (number of the step, its estimate of the data "b ...") -> whether to stop.
ReportFn: TypeAlias = Callable[[Int[Array, ""], Array], Bool[Array, ""]]


class Trajectory(NamedTuple):
  """What a sampler passed through in n steps."""

  samples: Float[Array, "n+1 b *shape"]  # begins with the given latents
  denoised: Float[Array, "n b *shape"]  # each step's estimate of the data


def sample(
  velocity_fn: VelocityFn,
  latents: Float[Array, "b *shape"],
  schedule: schedules.Schedule,
  *,
  key: Key[Array, ""] | None = None,
  noise: Float[Array, "n b *shape"] | None = None,
  project_fn: ProjectFn | None = None,
  report_fn: ReportFn | None = None,
) -> Float[Array, "b *shape"]:
  """Integrates `latents` along the schedule; returns the last sample.

  The state is float32 (or float64) whatever the network computes in. Schedules
  are pytrees: under `jax.jit`, pass them as arguments, and one compilation
  serves every shift and noise level with the same number of steps.

  Args:
    velocity_fn: called once a step as (x, sigma, timestep), the times repeated
      for each sample; what it returns is what the schedule expects: a velocity
      for flow schedules, a TrigFlow prediction for SCM.
    latents: at the schedule's first sigma, usually standard normal noise.
    schedule: from one of the solvers in `schedules`.
    key: noise of stochastic schedules; step i uses `fold_in(key, i)`.
      Deterministic ones have no use for it.
    noise: in place of `key`, the standard normal noise of each step.
    project_fn: called after every step as (x, the sigma it arrived at); what it
      returns goes on, such as x with a part replaced that is known.
    report_fn: called after every step; once it says stop, the network is not
      called again, and the sample stays as it is.

  Raises:
    ValueError: a stochastic schedule without noise, or superfluous noise.
  """
  return _scan(
    velocity_fn,
    latents,
    schedule,
    key,
    noise,
    project_fn,
    record=False,
    report_fn=report_fn,
  )[0]


def sample_trajectory(
  velocity_fn: VelocityFn,
  latents: Float[Array, "b *shape"],
  schedule: schedules.Schedule,
  *,
  key: Key[Array, ""] | None = None,
  noise: Float[Array, "n b *shape"] | None = None,
  project_fn: ProjectFn | None = None,
) -> Trajectory:
  """Does what `sample` does, and returns every step of it."""
  return _scan(
    velocity_fn, latents, schedule, key, noise, project_fn, record=True
  )[1]


def _scan(
  velocity_fn,
  latents,
  schedule,
  key,
  noise,
  project_fn,
  *,
  record,
  report_fn=None,
):
  _check_noise(schedule, key, noise)
  dtype = jnp.promote_types(latents.dtype, jnp.float32)
  num_steps, num_weights = schedule.update.shape
  batch = latents.shape[0]

  def step(carry, inputs):
    x, estimates = carry
    index, row, arrival, given = inputs
    prediction = velocity_fn(
      x,
      jnp.full((batch,), row.sigmas, jnp.float32),
      jnp.full((batch,), row.timesteps, jnp.float32),
    )
    denoised = row.denoise[0] * x + row.denoise[1] * prediction.astype(dtype)
    estimates = (denoised, *estimates)
    x = row.update[0] * x
    for weight, estimate in zip(row.update[1:], estimates, strict=True):
      x += weight * estimate
    if row.noise is not None:
      if given is None:
        step_key = jax.random.fold_in(key, index)
        given = jax.random.normal(step_key, x.shape, dtype)
      x += row.noise * given.astype(dtype)
    if project_fn is not None:
      x = project_fn(x, jnp.full((batch,), arrival, jnp.float32)).astype(dtype)
    return (x, estimates[:-1]), (x, denoised)

  def keep(carry, inputs):
    carry, outputs = step(carry, inputs)
    return carry, outputs if record else None

  def report(carry, inputs):
    def go_on(state):
      state, (_, denoised) = step(state, inputs)
      return state, report_fn(inputs[0], denoised)

    state, stopped = carry
    return jax.lax.cond(stopped, lambda s: (s, stopped), go_on, state), None

  rows = jax.tree.map(
    lambda a: jnp.asarray(a, dtype),
    schedule._replace(sigmas=schedule.sigmas[:-1]),
  )
  x = latents.astype(dtype)
  # Earlier estimates a multistep solver does not have yet; their weight is 0.
  start = (x, (jnp.zeros_like(x),) * (num_weights - 2))
  inputs = (
    jnp.arange(num_steps),
    rows,
    jnp.asarray(schedule.sigmas[1:]),
    noise,
  )
  if report_fn is not None:
    ((x, _), _), _ = jax.lax.scan(report, (start, jnp.bool_(False)), inputs)
    return x, None
  (x, _), outputs = jax.lax.scan(keep, start, inputs)
  if not record:
    return x, None
  samples, denoised = outputs
  first = latents.astype(dtype)[None]
  return x, Trajectory(jnp.concatenate([first, samples]), denoised)


def _check_noise(schedule, key, noise):
  if schedule.noise is None:
    if noise is not None:
      raise ValueError(
        f"noise of shape {noise.shape} given, but the schedule is "
        "deterministic; leave it out."
      )
    return
  if (key is None) == (noise is None):
    given = "neither" if key is None else "both"
    raise ValueError(
      "A stochastic schedule needs either key or noise; "
      f"{given} of them was given."
    )
  if noise is not None and noise.shape[0] != schedule.num_steps:
    raise ValueError(
      f"noise has shape {noise.shape}, but the schedule has "
      f"{schedule.num_steps} steps: expected ({schedule.num_steps}, b, ...)."
    )
