import dataclasses

import numpy as np
import pytest

from sana_jax.diffusion import schedules

# Timesteps that the published models receive, by (steps, shift).
DPM_TIMESTEPS = {
  (14, 3.0): "999 974 947 916 881 843 799 749 691 624 545 449 333 187",
  (18, 3.0): "999 980 959 937 912 886 856 824 789 749 705 655 599 535 461 374 "
  "272 149",
  (20, 3.0): "999 982 963 944 922 899 874 847 817 785 749 710 666 617 562 499 "
  "428 345 249 136",
  (28, 3.0): "999 987 974 961 947 932 916 899 881 863 843 822 799 775 749 721 "
  "691 659 624 586 545 499 449 394 333 264 187 99",
  (20, 4.0): "999 986 972 957 940 922 902 881 856 829 799 765 726 682 631 571 "
  "499 413 307 173",
  (20, 6.0): "999 991 981 971 959 947 933 917 899 879 856 830 799 763 719 666 "
  "599 513 399 239",
}
EULER_TIMESTEPS = {
  14: "1000 973.058 943.048 909.412 871.453 828.280 778.738 721.306 653.936 "
  "573.805 476.909 357.368 206.198 8.929",
  20: "1000 981.875 962.386 941.373 918.652 894.003 867.172 837.855 805.689 "
  "770.239 730.974 687.244 638.240 582.948 520.074 447.944 364.352 266.330 "
  "149.787 8.929",
}


def _numbers(text):
  return np.array(text.split(), np.float64)


@pytest.mark.parametrize(("steps", "shift"), DPM_TIMESTEPS)
def test_dpm_timesteps_are_truncated_integers(steps, shift):
  schedule = schedules.FlowDPMSolver(flow_shift=shift).schedule(steps)
  np.testing.assert_array_equal(
    schedule.timesteps, _numbers(DPM_TIMESTEPS[steps, shift])
  )
  assert schedule.sigmas[-1] == 0
  assert schedule.num_steps == steps


def test_dpm_coefficients_of_the_default_run():
  # r and h_i / (2 h_i-1), twenty steps, shift 3.
  ratios = _numbers(
    ".982747 .981191 .979411 .977362 .974985 .972206 .968927 .965016 .960297 "
    ".954523 .947343 .938244 .926440 .910681 .888852 .857102 .807648 .722176 "
    ".545413 0"
  )
  halves = _numbers(
    ".092582 .311462 .377354 .413511 .437151 .454386 .468027 .479597 .490054 "
    ".500101 .510360 .521508 .534442 .550560 .572406 .605415 .664150 .807635"
  )
  update = schedules.FlowDPMSolver().schedule(20).update
  np.testing.assert_allclose(update[:, 0], ratios, atol=1e-6)
  steps = update[1:-1]
  np.testing.assert_allclose(
    -steps[:, 2] / (1 - steps[:, 0]), halves, rtol=2e-5
  )
  # First and last step are of order 1.
  np.testing.assert_array_equal(update[[0, -1], 2], 0)


@pytest.mark.parametrize("steps", EULER_TIMESTEPS)
def test_euler_timesteps_are_not_rounded_and_end_with_a_double_shift(steps):
  schedule = schedules.FlowEuler(shift=3.0).schedule(steps)
  np.testing.assert_allclose(
    schedule.timesteps, _numbers(EULER_TIMESTEPS[steps]), atol=1e-3
  )
  np.testing.assert_allclose(
    schedule.timesteps, 1000 * schedule.sigmas[:-1], rtol=1e-6
  )


def test_custom_euler_sigmas_are_shifted():
  schedule = schedules.FlowEuler(shift=3.0).custom_schedule([1.0, 0.5, 0.1])
  np.testing.assert_allclose(schedule.sigmas, [1, 0.75, 0.25, 0], rtol=1e-6)


@pytest.mark.parametrize(
  ("steps", "middle", "angles"),
  [
    (1, None, [1.5708]),
    (2, 1.3, [1.5708, 1.3]),
    (2, None, [1.5708, 0.7854]),
    (4, None, [1.5708, 1.1781, 0.7854, 0.3927]),
  ],
)
def test_scm_angles(steps, middle, angles):
  schedule = schedules.SCM().schedule(steps, intermediate_timesteps=middle)
  np.testing.assert_allclose(schedule.timesteps, angles, rtol=1e-6)
  # The sample itself is forgotten at each step, and no noise is left at last.
  np.testing.assert_array_equal(schedule.update[:, 0], 0)
  assert schedule.noise[-1] == 0


def _solvers():
  for order in (1, 2, 3):
    for kind in ("midpoint", "heun"):
      for final in ("zero", "sigma_min"):
        for algorithm in ("dpmsolver++", "sde-dpmsolver++"):
          if order < 3 or algorithm == "dpmsolver++":
            yield schedules.FlowDPMSolver(
              solver_order=order,
              solver_type=kind,
              final_sigmas_type=final,
              algorithm_type=algorithm,
            )
  yield schedules.FlowDPMSolver(lower_order_final=False)
  yield schedules.FlowDPMSolver(euler_at_final=True, solver_order=3)
  yield schedules.FlowEuler(shift=1.0)


@pytest.mark.parametrize("steps", [1, 2, 3, 6, 20])
def test_every_solver_maps_marginals_to_marginals(steps):
  for solver in _solvers():
    sigmas, _, denoise, update, noise = solver.schedule(steps)
    start, stop = sigmas[:-1].astype(float), sigmas[1:].astype(float)
    # With a constant estimate d, x = (1 - sigma) d + sigma n stays so: the
    # weight of the data, and the variance of the noise.
    data = update[:, 0] * (1 - start) + update[:, 1:].sum(axis=1)
    np.testing.assert_allclose(data, 1 - stop, atol=1e-6, err_msg=str(solver))
    fresh = 0.0 if noise is None else noise**2
    variance = (update[:, 0] * start) ** 2 + fresh
    np.testing.assert_allclose(
      variance, stop**2, atol=1e-6, err_msg=str(solver)
    )
    np.testing.assert_allclose(denoise[:, 1], -start, atol=1e-7)


def _orders(solver, steps, **kwargs):
  update = solver.schedule(steps, **kwargs).update[:, 1:]
  return [int(np.max(np.flatnonzero(row), initial=-1)) + 1 for row in update]


def test_orders_rise_at_the_start_and_fall_at_the_end():
  third = schedules.FlowDPMSolver(solver_order=3)
  replace = dataclasses.replace
  assert _orders(third, 6) == [1, 2, 3, 3, 2, 1]
  assert _orders(replace(third, lower_order_final=False), 6) == [
    *(1, 2, 3, 3, 3, 1)
  ]
  assert _orders(third, 15) == [1, 2, *[3] * 12, 1]
  assert _orders(schedules.FlowDPMSolver(), 6) == [1, 2, 2, 2, 2, 1]
  # Skipped steps leave no estimates behind.
  assert _orders(third, 15, begin_index=10) == [1, 2, 3, 3, 1]


def test_a_step_that_stands_still_changes_nothing():
  for order in (1, 2, 3):
    solver = schedules.FlowDPMSolver(
      solver_order=order, solver_type="heun", final_sigmas_type="sigma_min"
    )
    last = solver.schedule(20).update[-1]
    np.testing.assert_array_equal(last, [1, *[0] * order])


def test_skipping_steps_keeps_the_remaining_levels():
  for solver in (schedules.FlowDPMSolver(), schedules.FlowEuler()):
    full, rest = solver.schedule(8), solver.schedule(8, begin_index=3)
    np.testing.assert_array_equal(rest.sigmas, full.sigmas[3:])
    np.testing.assert_array_equal(rest.timesteps, full.timesteps[3:])
  full = schedules.SCM().schedule(4, intermediate_timesteps=None)
  rest = schedules.SCM().schedule(4, intermediate_timesteps=None, begin_index=1)
  for a, b in zip(full, rest, strict=True):
    np.testing.assert_array_equal(a[1:], b)


@pytest.mark.parametrize(
  ("make", "match"),
  [
    (lambda: schedules.FlowDPMSolver(flow_shift=0.0), "flow_shift is 0.0"),
    (lambda: schedules.FlowDPMSolver(solver_order=4), "solver_order is 4"),
    (
      lambda: schedules.FlowDPMSolver(solver_type="bh2"),
      "solver_type is 'bh2'",
    ),
    (
      lambda: schedules.FlowDPMSolver(algorithm_type="dpmsolver"),
      "algorithm_type is 'dpmsolver'",
    ),
    (
      lambda: schedules.FlowDPMSolver(final_sigmas_type="one"),
      "final_sigmas_type is 'one'",
    ),
    (
      lambda: schedules.FlowDPMSolver(
        solver_order=3, algorithm_type="sde-dpmsolver++"
      ),
      "solver_order 3 is not defined",
    ),
    (lambda: schedules.FlowEuler(shift=-1.0), "shift is -1.0"),
    (lambda: schedules.SCM(sigma_data=0.0), "sigma_data is 0.0"),
    (lambda: schedules.FlowDPMSolver().schedule(0), "number of steps is 0"),
    (
      lambda: schedules.FlowEuler().schedule(4, begin_index=4),
      r"begin_index \(4\) must lie in \[0, 4\)",
    ),
    (
      lambda: schedules.FlowEuler().custom_schedule([1.0, 0.2, 0.3]),
      r"sigmas \[1.0, 0.2, 0.3\] must decrease",
    ),
    (
      lambda: schedules.FlowEuler().custom_schedule([1.0, 0.0]),
      "the final 0 is added",
    ),
    (
      lambda: schedules.SCM().schedule(4),
      r"intermediate_timesteps \(1.3\) is for 2 steps",
    ),
    (
      lambda: schedules.SCM().custom_schedule([1.5, 0.5]),
      "must decrease and end with 0",
    ),
    (
      lambda: schedules.SCM().schedule(2, max_timesteps=1.2),
      "must decrease and end with 0",
    ),
  ],
)
def test_impossible_requests_are_named(make, match):
  with pytest.raises(ValueError, match=match):
    make()
