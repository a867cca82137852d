"""Scheduler descriptions as diffusers stores them, in scheduler_config.json."""

import math
from collections.abc import Mapping
from typing import Any

from sana_jax.diffusion import schedules

Solver = schedules.FlowDPMSolver | schedules.FlowEuler | schedules.SCM

# Options come in three kinds. Read: fields of ours, with the values diffusers
# assumes where a file leaves them out. Fixed: (the one value we support, what
# diffusers assumes). Inert: no effect on flow models, given the fixed ones.
_DPM = "DPMSolverMultistepScheduler"
_DPM_READ = {
  "algorithm_type": "dpmsolver++",
  "euler_at_final": False,
  "final_sigmas_type": "zero",
  "flow_shift": 1.0,
  "lower_order_final": True,
  "num_train_timesteps": 1000,
  "solver_order": 2,
  "solver_type": "midpoint",
}
_DPM_FIXED = {
  "prediction_type": ("flow_prediction", "epsilon"),
  "thresholding": (False, False),
  "use_beta_sigmas": (False, False),
  "use_dynamic_shifting": (False, False),
  "use_exponential_sigmas": (False, False),
  "use_flow_sigmas": (True, False),
  "use_karras_sigmas": (False, False),
  "use_lu_lambdas": (False, False),
  "variance_type": (None, None),
}
_DPM_INERT = {
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "beta_start": 0.0001,
  "dynamic_thresholding_ratio": 0.995,
  "lambda_min_clipped": -math.inf,
  "rescale_betas_zero_snr": False,
  "sample_max_value": 1.0,
  "steps_offset": 0,
  "time_shift_type": "exponential",
  "timestep_spacing": "linspace",
  "trained_betas": None,
}

_EULER = "FlowMatchEulerDiscreteScheduler"
_EULER_READ = {"num_train_timesteps": 1000, "shift": 1.0}
_EULER_FIXED = {
  "invert_sigmas": (False, False),
  "shift_terminal": (None, None),
  "stochastic_sampling": (False, False),
  "use_beta_sigmas": (False, False),
  "use_dynamic_shifting": (False, False),
  "use_exponential_sigmas": (False, False),
  "use_karras_sigmas": (False, False),
}
_EULER_INERT = {
  "base_image_seq_len": 256,
  "base_shift": 0.5,
  "max_image_seq_len": 4096,
  "max_shift": 1.15,
  "time_shift_type": "exponential",
}

_SCM = "SCMScheduler"
_SCM_READ = {"sigma_data": 0.5}
_SCM_FIXED = {"prediction_type": ("trigflow", "trigflow")}
_SCM_INERT = {"num_train_timesteps": 1000}


def from_config(config: Mapping[str, Any]) -> Solver:
  """Reads the contents of a diffusers scheduler_config.json.

  Args:
    config: the parsed file; options left out have diffusers' defaults, and keys
      beginning with an underscore, other than the class, are ignored.

  Raises:
    ValueError: a class or options without an equivalent here; all are named.
  """
  name = config.get("_class_name")
  if name == _DPM:
    read = _read(config, _DPM_READ, _DPM_FIXED, _DPM_INERT)
    return schedules.FlowDPMSolver(**read)
  if name == _EULER:
    read = _read(config, _EULER_READ, _EULER_FIXED, _EULER_INERT)
    return schedules.FlowEuler(**read)
  if name == _SCM:
    read = _read(config, _SCM_READ, _SCM_FIXED, _SCM_INERT)
    return schedules.SCM(**read)
  raise ValueError(
    f"Scheduler _class_name is {name!r}; expected one of "
    f"{(_DPM, _EULER, _SCM)}."
  )


def to_config(solver: Solver) -> dict[str, Any]:
  """Returns the dict that `from_config` and diffusers read back.

  It holds an infinity for DPM-Solver, which `json.dumps` writes as -Infinity,
  like diffusers.
  """
  if isinstance(solver, schedules.FlowDPMSolver):
    name, read, fixed, inert = _DPM, _DPM_READ, _DPM_FIXED, _DPM_INERT
  elif isinstance(solver, schedules.FlowEuler):
    name, read, fixed, inert = _EULER, _EULER_READ, _EULER_FIXED, _EULER_INERT
  else:
    name, read, fixed, inert = _SCM, _SCM_READ, _SCM_FIXED, _SCM_INERT
  options = {key: getattr(solver, key) for key in read}
  options |= {key: ours for key, (ours, _) in fixed.items()} | inert
  return {"_class_name": name, **dict(sorted(options.items()))}


def _read(config, read, fixed, inert) -> dict[str, Any]:
  problems = []
  for key, (ours, default) in fixed.items():
    value = config.get(key, default)
    if value != ours:
      problems.append(f"{key} is {value!r}, only {ours!r} is supported")
  for key in config:
    if not key.startswith("_") and not (
      key in read or key in fixed or key in inert
    ):
      problems.append(f"{key} is not a known option")
  if problems:
    raise ValueError(f"{config['_class_name']}: " + "; ".join(problems) + ".")
  return {key: config.get(key, default) for key, default in read.items()}
