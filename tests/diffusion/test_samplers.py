import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import samplers, schedules

SOLVERS = [
  schedules.FlowDPMSolver(),
  schedules.FlowDPMSolver(solver_order=1),
  schedules.FlowDPMSolver(solver_type="heun"),
  schedules.FlowDPMSolver(solver_order=3),
  schedules.FlowEuler(),
]

# x = 1, v(x, t) = x / 2 + t / 1000; samples after each step, computed once with
# the reference schedulers.
DPM_14 = (
  ".962513 .922397 .879616 .833791 .784654 .731877 .675354 .614988 .551004 "
  ".484002 .415626 .349917 .296658 .233839"
)
DPM_20 = (
  ".974147 .947052 .918743 .889018 .857831 .825054 .790605 .754396 .716382 "
  ".676462 .634675 .590996 .545607 .498742 .450879 .402938 .356261 .313732 "
  ".281242 .243555"
)
EULER_20 = (
  ".972812 .944197 .914055 .882281 .848764 .813390 .776044 .736613 .694995 "
  ".651107 .604904 .556406 .505733 .453183 .399326 .345191 .292558 .244471 "
  ".206155 .205155"
)


@pytest.mark.parametrize(
  ("solver", "steps", "expected"),
  [
    (schedules.FlowDPMSolver(), 14, DPM_14),
    (schedules.FlowDPMSolver(), 20, DPM_20),
    (schedules.FlowEuler(), 20, EULER_20),
  ],
)
def test_scalar_trajectories_are_those_of_the_reference(
  solver, steps, expected
):
  samples, _ = samplers.sample_trajectory(
    lambda x, _, timestep: 0.5 * x + 0.001 * timestep[:, None],
    jnp.ones((1, 1)),
    solver.schedule(steps),
  )
  expected = np.array(["1", *expected.split()], np.float64)
  # Six digits are given.
  np.testing.assert_allclose(samples[:, 0, 0], expected, atol=1.5e-6)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
def test_straight_paths_are_exact(solver, steps):
  keys = jax.random.split(jax.random.key(0))
  clean, noise = (jax.random.normal(k, (2, 4, 3, 5)) for k in keys)
  schedule = solver.schedule(steps)
  sigma = schedule.sigmas[0]
  out = samplers.sample(
    lambda x, sigma, timestep: noise - clean,
    (1 - sigma) * clean + sigma * noise,
    schedule,
  )
  # A few roundings a step.
  np.testing.assert_allclose(out, clean, atol=5e-6)


def _gaussian_error(solver, steps):
  """Error against the exact flow of data with mean 0.5, deviation 0.3.

  There the mean velocity is linear in x, and a sample keeps its quantile.
  """
  mean, std = 0.5, 0.3

  def velocity(x, sigma, timestep):
    del timestep
    sigma = sigma[:, None]
    variance = ((1 - sigma) * std) ** 2 + sigma**2
    slope = (sigma - (1 - sigma) * std**2) / variance
    return slope * (x - (1 - sigma) * mean) - mean

  schedule = solver.schedule(steps)
  # The coefficients are exact, the sigmas a network sees are float32: use the
  # former.
  schedule = schedule._replace(sigmas=np.append(-schedule.denoise[:, 1], 0.0))
  sigma = schedule.sigmas[0]
  quantile = np.array([[-1.3], [0.4], [2.0]])
  spread = np.sqrt(((1 - sigma) * std) ** 2 + sigma**2)
  start = (1 - sigma) * mean + spread * quantile
  out = samplers.sample(velocity, jnp.asarray(start), schedule)
  assert out.dtype == jnp.float64
  return float(np.max(np.abs(out - (mean + std * quantile))))


@pytest.mark.parametrize(
  ("solver", "order"),
  [
    (schedules.FlowEuler(), 1),
    (schedules.FlowDPMSolver(solver_order=1), 1),
    (schedules.FlowDPMSolver(), 2),
    (schedules.FlowDPMSolver(solver_type="heun"), 2),
    (schedules.FlowDPMSolver(solver_order=3), 2),
  ],
)
def test_errors_fall_with_the_order_in_float64(solver, order):
  with jax.enable_x64(True):
    errors = [_gaussian_error(solver, n) for n in (400, 800)]
  # Twice the steps divide the error by 2^order in the limit. Order 3 reaches 2:
  # its first steps are of lower order, and log SNR is singular at both ends.
  assert errors[0] / errors[1] > 0.75 * 2**order, errors


def test_the_state_is_float32_for_bfloat16_networks_and_latents():
  x = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
  schedule = schedules.FlowDPMSolver().schedule(4)
  seen = []

  def velocity(x, sigma, timestep):
    seen.extend([x.dtype, sigma.dtype, timestep.dtype])
    return (0.5 * x).astype(jnp.bfloat16)

  out = samplers.sample(velocity, x.astype(jnp.bfloat16), schedule)
  assert out.dtype == jnp.float32
  assert set(seen) == {jnp.dtype("float32")}


def test_a_batch_of_two_is_two_batches_of_one():
  x = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
  schedule = schedules.FlowDPMSolver().schedule(5)
  velocity = lambda x, s, t: jnp.tanh(x) + s[:, None, None, None]  # noqa: E731
  both = samplers.sample(velocity, x, schedule)
  for i in range(2):
    one = samplers.sample(velocity, x[i : i + 1], schedule)
    np.testing.assert_allclose(both[i : i + 1], one, rtol=1e-6)


def test_the_trajectory_ends_with_the_sample():
  x = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
  schedule = schedules.FlowDPMSolver().schedule(5)
  velocity = lambda x, s, t: jnp.tanh(x)  # noqa: E731
  samples, denoised = samplers.sample_trajectory(velocity, x, schedule)
  assert samples.shape == (6, *x.shape)
  assert denoised.shape == (5, *x.shape)
  np.testing.assert_array_equal(samples[0], x)
  # The same operations, but XLA may fuse them otherwise.
  np.testing.assert_allclose(
    samples[-1], samplers.sample(velocity, x, schedule), atol=1e-6
  )
  # The last sigma is 0, so the last estimate is the result.
  np.testing.assert_array_equal(samples[-1], denoised[-1])
  np.testing.assert_allclose(
    denoised[0], x - schedule.sigmas[0] * jnp.tanh(x), atol=1e-6
  )


def test_one_compilation_serves_every_shift_and_the_network_is_traced_once():
  x = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
  traces = []

  @jax.jit
  def run(x, schedule):
    def velocity(x, sigma, timestep):
      traces.append(1)
      return jnp.tanh(x)

    return samplers.sample(velocity, x, schedule)

  outs = []
  for shift in (1.0, 3.0, 6.0):
    schedule = schedules.FlowDPMSolver(flow_shift=shift).schedule(6)
    outs.append(run(x, schedule))
    np.testing.assert_allclose(
      outs[-1],
      samplers.sample(lambda x, s, t: jnp.tanh(x), x, schedule),
      rtol=1e-5,
    )
  assert len(traces) == 1
  assert float(jnp.max(jnp.abs(outs[0] - outs[1]))) > 1e-3


def test_the_network_is_called_with_a_time_for_each_sample():
  x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
  schedule = schedules.FlowDPMSolver().schedule(4)
  seen = []

  def velocity(x, sigma, timestep):
    jax.debug.callback(
      lambda *times: seen.append(np.stack(times)),
      *(sigma, timestep),
      ordered=True,
    )
    return 0 * x

  samplers.sample(velocity, x, schedule)
  jax.effects_barrier()
  expected = np.stack([schedule.sigmas[:-1], schedule.timesteps], axis=1)
  np.testing.assert_array_equal(
    np.stack(seen), np.repeat(expected[:, :, None], 3, axis=2)
  )


def test_a_key_means_its_folded_normal_draws():
  x = jax.random.normal(jax.random.key(0), (2, 3, 3, 1))
  key = jax.random.key(7)
  draws = jnp.stack(
    [jax.random.normal(jax.random.fold_in(key, i), x.shape) for i in range(4)]
  )
  velocity = lambda x, s, t: jnp.tanh(x)  # noqa: E731
  for schedule in (
    schedules.SCM().schedule(4, intermediate_timesteps=None),
    schedules.FlowDPMSolver(algorithm_type="sde-dpmsolver++").schedule(4),
  ):
    from_key = samplers.sample(velocity, x, schedule, key=key)
    from_noise = samplers.sample(velocity, x, schedule, noise=draws)
    # The same operations, but XLA may fuse them otherwise.
    np.testing.assert_allclose(from_key, from_noise, atol=1e-6)
    other = samplers.sample(velocity, x, schedule, key=jax.random.key(8))
    assert float(jnp.max(jnp.abs(other - from_key))) > 1e-2


def test_sde_steps_keep_the_variance_of_the_noise():
  # Data that is always 0: the exact velocity is x / sigma.
  schedule = schedules.FlowDPMSolver(algorithm_type="sde-dpmsolver++").schedule(
    8
  )
  x = schedule.sigmas[0] * jax.random.normal(jax.random.key(0), (20_000, 1))
  samples, _ = samplers.sample_trajectory(
    lambda x, sigma, _: x / sigma[:, None], x, schedule, key=jax.random.key(1)
  )
  # The standard error of a deviation from 20,000 samples is 0.5 %.
  np.testing.assert_allclose(
    jnp.std(samples[:-1, :, 0], axis=1), schedule.sigmas[:-1], rtol=0.02
  )
  np.testing.assert_allclose(samples[-1], 0, atol=1e-6)


@pytest.mark.parametrize(
  ("given", "match"),
  [
    ({}, "neither of them was given"),
    ({"key": 0, "noise": (2, 2, 3)}, "both of them was given"),
    ({"noise": (3, 2, 3)}, r"noise has shape \(3, 2, 3\).* 2 steps"),
  ],
)
def test_stochastic_schedules_need_one_source_of_noise(given, match):
  key = jax.random.key(0) if "key" in given else None
  noise = jnp.ones(given["noise"]) if "noise" in given else None
  with pytest.raises(ValueError, match=match):
    samplers.sample(
      lambda x, s, t: x,
      jnp.ones((2, 3)),
      schedules.SCM().schedule(2),
      key=key,
      noise=noise,
    )


def test_superfluous_noise_is_an_error():
  with pytest.raises(ValueError, match="the schedule is deterministic"):
    samplers.sample(
      lambda x, s, t: x,
      jnp.ones((2, 3)),
      schedules.FlowEuler().schedule(2),
      noise=jnp.ones((2, 2, 3)),
    )
