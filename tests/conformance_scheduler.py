"""Scheduler reference cases, computed with the public API.

`scheduler_case` turns a case's description and inputs into its outputs, under
the names the case lists.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.diffusion import samplers, scheduler_config, schedules


def scheduler_case(
  case: dict, inputs: dict[str, np.ndarray], case_dir: pathlib.Path
) -> dict[str, np.ndarray]:
  """Returns every `out.` tensor that `case["tensors"]` names.

  Args:
    case: the contents of case.json.
    inputs: the `in.` tensors, with their prefix.
    case_dir: where scheduler_config.json is.
  """
  config = json.loads(
    (pathlib.Path(case_dir) / "scheduler_config.json").read_text()
  )
  wanted = [name for name in case["tensors"] if name.startswith("out.")]
  outputs = {}
  for run in dict.fromkeys(
    name.split(".", 1)[1].rsplit(".", 1)[0] for name in wanted
  ):
    results = _run(run, config, case, inputs)
    for name in wanted:
      stem, _, kind = name.rpartition(".")
      if stem == f"out.{run}":
        outputs[name] = np.asarray(results[kind]())
  return outputs


def _run(run, config, case, inputs):
  solver = scheduler_config.from_config(config | _overrides(run, case))
  schedule = _schedule(solver, run, case, inputs)
  timesteps = schedule.timesteps
  if isinstance(solver, schedules.SCM):
    timesteps = np.append(timesteps, np.float32(0))
  if isinstance(solver, schedules.FlowDPMSolver):
    timesteps = timesteps.astype(np.int64)
  noise = inputs.get(f"in.{run}.noise")
  start = inputs.get(f"in.{run}.initial_sample", inputs["in.initial_sample"])

  @jax.jit
  def trajectory(latents, noise):
    fn = _analytic_model(inputs["in.model_coefficients"])
    return samplers.sample_trajectory(fn, latents, schedule, noise=noise)

  return {
    "timesteps": lambda: timesteps,
    "sigmas": lambda: schedule.sigmas,
    "trajectory": lambda: trajectory(start, noise).samples,
    "denoised": lambda: trajectory(start, noise).denoised,
  }


def _schedule(solver, run, case, inputs):
  options = dict(case.get("runs", {}).get(run, {}))
  steps = re.search(r"steps(\d+)", run)
  num_steps = options.pop("num_inference_steps", None) or (
    int(steps.group(1)) if steps else None
  )
  if isinstance(solver, schedules.FlowEuler):
    sigmas = inputs.get(f"in.{run}.sigmas", options.get("sigmas"))
    if sigmas is not None:
      return solver.custom_schedule(sigmas)
  if isinstance(solver, schedules.SCM):
    timesteps = inputs.get(f"in.{run}.timesteps", options.get("timesteps"))
    if timesteps is not None:
      return solver.custom_schedule(timesteps)
    known = ("max_timesteps", "intermediate_timesteps")
    return solver.schedule(
      num_steps, **{k: options[k] for k in known if k in options}
    )
  return solver.schedule(num_steps)


def _overrides(run, case):
  """Reads the options of a run that differ from the case's configuration."""
  overrides = {}
  for name, info in case["tensors"].items():
    note = info.get("note", "")
    if name.startswith(f"out.{run}.") and note.startswith("{"):
      overrides |= json.loads(note)
  return overrides


def _analytic_model(a):
  def model(x, sigma, timestep):
    del sigma
    t = timestep.reshape((-1,) + (1,) * (x.ndim - 1))
    return (
      a[0] * jnp.tanh(a[1] * x)
      + a[2] * x
      + a[3] * jnp.cos(a[4] * t)
      + a[5] * jnp.roll(x, 1, axis=-1)
    )

  return model
