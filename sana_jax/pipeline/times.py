"""When the transformer is called: schedules from settings."""

from collections.abc import Sequence

from sana_jax.diffusion import scheduler_config, schedules
from sana_jax.pipeline import options


def make_schedule(
  solver: scheduler_config.Solver,
  settings: options.GenerationConfig,
  *,
  sigmas: Sequence[float] | None = None,
  timesteps: Sequence[float] | None = None,
  strength: float = 1.0,
) -> schedules.Schedule:
  """Works out the sampler's steps.

  Args:
    sigmas: custom noise levels, as `timesteps`; for some solvers only.
    strength: the share of the steps that is run, the last ones.
  """
  custom = timesteps if sigmas is None else sigmas
  if custom is not None:
    steps = len(custom) - (sigmas is None)  # angles end with 0
    begin = schedules.begin_index(steps, strength)
    return solver.custom_schedule(custom, begin_index=begin)
  angles = {}
  if isinstance(solver, schedules.SCM):
    angles = {
      "max_timesteps": settings.max_timesteps,
      "intermediate_timesteps": settings.intermediate_timesteps,
    }
  steps = settings.num_inference_steps
  begin = schedules.begin_index(steps, strength)
  return solver.schedule(steps, begin_index=begin, **angles)
