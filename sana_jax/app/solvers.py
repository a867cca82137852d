"""The samplers that a checkpoint can be sampled with."""

from collections.abc import Mapping

from sana_jax.diffusion import scheduler_config, schedules


def of(
  solver: scheduler_config.Solver,
) -> Mapping[str, scheduler_config.Solver]:
  """Returns samplers by name, the checkpoint's own first.

  Others of the same kind have its shift; SANA-Sprint has one only.
  """
  own = {type(solver).__name__: solver}
  if isinstance(solver, schedules.FlowDPMSolver):
    others = [
      schedules.FlowEuler(
        shift=solver.flow_shift, num_train_timesteps=solver.num_train_timesteps
      )
    ]
  elif isinstance(solver, schedules.FlowEuler):
    others = [
      schedules.FlowDPMSolver(
        flow_shift=solver.shift, num_train_timesteps=solver.num_train_timesteps
      )
    ]
  else:
    others = []
  return own | {type(other).__name__: other for other in others}
