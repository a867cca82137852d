import json
import math

import pytest

from sana_jax.diffusion import scheduler_config, schedules

DPM = {
  "_class_name": "DPMSolverMultistepScheduler",
  "flow_shift": 3.0,
  "prediction_type": "flow_prediction",
  "use_flow_sigmas": True,
}
EULER = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
SCM = {"_class_name": "SCMScheduler"}


def test_short_configs_have_the_defaults_of_diffusers():
  assert scheduler_config.from_config(DPM) == schedules.FlowDPMSolver()
  assert scheduler_config.from_config(EULER) == schedules.FlowEuler()
  assert scheduler_config.from_config(SCM) == schedules.SCM()
  assert scheduler_config.from_config(
    DPM | {"flow_shift": 8.0, "solver_order": 3, "solver_type": "heun"}
  ) == schedules.FlowDPMSolver(
    flow_shift=8.0, solver_order=3, solver_type="heun"
  )
  without = {k: v for k, v in DPM.items() if k != "flow_shift"}
  assert scheduler_config.from_config(without).flow_shift == 1.0


@pytest.mark.parametrize(
  "solver",
  [
    schedules.FlowDPMSolver(
      flow_shift=4.0,
      solver_order=1,
      solver_type="heun",
      algorithm_type="sde-dpmsolver++",
      lower_order_final=False,
      euler_at_final=True,
      final_sigmas_type="sigma_min",
      num_train_timesteps=500,
    ),
    schedules.FlowEuler(shift=8.0, num_train_timesteps=100),
    schedules.SCM(sigma_data=0.7),
  ],
)
def test_solvers_survive_a_json_file(solver):
  text = json.dumps(scheduler_config.to_config(solver))
  assert scheduler_config.from_config(json.loads(text)) == solver


def test_minus_infinity_is_read_and_written():
  config = json.loads('{"lambda_min_clipped": -Infinity}') | DPM
  solver = scheduler_config.from_config(config)
  written = scheduler_config.to_config(solver)
  assert written["lambda_min_clipped"] == -math.inf
  assert "-Infinity" in json.dumps(written)


def test_all_unsupported_options_are_named_at_once():
  config = DPM | {"use_karras_sigmas": True, "thresholding": True, "extra": 1}
  with pytest.raises(ValueError, match="use_karras_sigmas is True") as error:
    scheduler_config.from_config(config)
  assert "thresholding is True" in str(error.value)
  assert "extra is not a known option" in str(error.value)


def test_epsilon_models_are_not_flow_models():
  config = {"_class_name": "DPMSolverMultistepScheduler"}
  with pytest.raises(ValueError, match="prediction_type is 'epsilon'"):
    scheduler_config.from_config(config)


def test_option_values_are_checked_by_the_solver():
  with pytest.raises(ValueError, match="solver_order is 5"):
    scheduler_config.from_config(DPM | {"solver_order": 5})


def test_an_unknown_class_is_named():
  with pytest.raises(ValueError, match="_class_name is 'DDIMScheduler'"):
    scheduler_config.from_config({"_class_name": "DDIMScheduler"})
