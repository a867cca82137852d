import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.diffusion import samplers, schedules, trigflow


def _velocity(x, sigma, timestep):
  del sigma
  return 0.3 * x + 0.2 * timestep.reshape((-1,) + (1,) * (x.ndim - 1))


def test_flow_time_of_known_angles():
  angles = jnp.array([0.0, 0.3927, 0.7854, 1.1781, 1.3, 1.57080])
  np.testing.assert_allclose(
    trigflow.flow_time(angles),
    [0.0, 0.292894, 0.500001, 0.707108, 0.782708, 1.0000037],
    atol=1e-6,  # digits given
  )


def test_trig_time_inverts_flow_time():
  times = jnp.linspace(0, 1, 21)
  there = trigflow.flow_time(trigflow.trig_time(times))
  np.testing.assert_allclose(there, times, atol=1e-6)


def test_both_views_agree_on_the_clean_sample():
  u = jax.random.normal(jax.random.key(0), (4, 3, 2, 5))
  s = jnp.array([0.2, 0.7, 1.3, 1.57])
  prediction = trigflow.predict(_velocity, u, s)
  t = trigflow.flow_time(s)[:, None, None, None]
  x = u * jnp.sqrt(t**2 + (1 - t) ** 2)
  from_flow = x - t * _velocity(x, None, t)
  s = s[:, None, None, None]
  from_circle = jnp.cos(s) * u - jnp.sin(s) * prediction
  # Identity in exact arithmetic; a few roundings of numbers of order 3.
  np.testing.assert_allclose(from_circle, from_flow, atol=2e-6)


def test_a_perfect_velocity_becomes_a_perfect_prediction():
  keys = jax.random.split(jax.random.key(1))
  clean, noise = (jax.random.normal(k, (2, 3, 3, 1)) for k in keys)
  s = jnp.array([0.4, 1.2])
  sin, cos = jnp.sin(s)[:, None, None, None], jnp.cos(s)[:, None, None, None]
  prediction = trigflow.predict(
    lambda x, sigma, t: noise - clean, cos * clean + sin * noise, s
  )
  np.testing.assert_allclose(prediction, cos * noise - sin * clean, atol=2e-6)


def test_the_prediction_has_a_forward_derivative_in_time():
  u = jax.random.normal(jax.random.key(0), (1, 2, 2, 1))
  f = lambda s: trigflow.predict(_velocity, u, s)  # noqa: E731
  s = jnp.array([0.9])
  _, slope = jax.jvp(f, (s,), (jnp.ones(1),))
  step = 1e-2
  # Central difference: error of order step^2 plus rounding / step.
  difference = (f(s + step) - f(s - step)) / (2 * step)
  np.testing.assert_allclose(slope, difference, atol=2e-4)


def test_first_step_of_the_scalar_check():
  z, sigma_data = jnp.full((1, 1), 0.8), 0.5
  prediction_fn = trigflow.prediction_fn(_velocity, sigma_data=sigma_data)
  s = jnp.array([1.57080])
  prediction = prediction_fn(z * sigma_data, trigflow.flow_time(s), s)
  # Computed once with the formulas of the paper.
  np.testing.assert_allclose(prediction, -0.180001, atol=1e-6)


def test_scalar_consistency_sampling():
  # z = 0.8, unit noise 0.1 at every step; final values computed once with the
  # reference formulas, six digits.
  for steps, middle, expected in [
    (1, None, 0.360000),
    (2, 1.3, -0.002778),
    (4, None, 0.015352),
  ]:
    schedule = schedules.SCM().schedule(steps, intermediate_timesteps=middle)
    out = samplers.sample(
      trigflow.prediction_fn(_velocity),
      jnp.full((1, 1), 0.8 * 0.5),
      schedule,
      noise=jnp.full((steps, 1, 1), 0.1),
    )
    if steps > 1:
      np.testing.assert_allclose(out / 0.5, expected, atol=1e-6)
    else:
      np.testing.assert_allclose(out / 0.5, 0.36, atol=1e-5)
