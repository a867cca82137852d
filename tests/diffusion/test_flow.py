import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import flow


def _latents(seed, shape=(3, 4, 5, 2)):
  return jax.random.normal(jax.random.key(seed), shape)


def test_the_path_runs_from_data_to_noise():
  clean, noise = _latents(0), _latents(1)
  np.testing.assert_array_equal(
    flow.interpolate(clean, noise, jnp.zeros(3)), clean
  )
  np.testing.assert_array_equal(
    flow.interpolate(clean, noise, jnp.ones(3)), noise
  )


def test_velocity_is_the_derivative_of_the_path():
  clean, noise = _latents(0), _latents(1)
  sigma = jnp.array([0.1, 0.5, 0.9])
  _, slope = jax.jvp(
    lambda s: flow.interpolate(clean, noise, s), (sigma,), (jnp.ones(3),)
  )
  # One rounding of the difference.
  np.testing.assert_allclose(slope, flow.velocity(clean, noise), atol=1e-6)


def test_each_sample_has_its_own_noise_level():
  clean, noise = _latents(0), _latents(1)
  sigma = jnp.array([0.2, 0.7, 0.4])
  mixed = flow.interpolate(clean, noise, sigma)
  for i in range(3):
    expected = (1 - sigma[i]) * clean[i] + sigma[i] * noise[i]
    np.testing.assert_allclose(mixed[i], expected, rtol=1e-6)


def test_bfloat16_latents_are_mixed_in_float32():
  clean = _latents(0).astype(jnp.bfloat16)
  mixed = flow.interpolate(clean, _latents(1), jnp.full((3,), 0.999))
  assert mixed.dtype == jnp.float32
  assert flow.velocity(clean, clean).dtype == jnp.float32


def test_shift_keeps_the_ends_and_one_is_the_identity():
  time = np.linspace(0, 1, 11)
  np.testing.assert_array_equal(flow.shift_time(time, 1.0), time)
  shifted = flow.shift_time(time, 3.0)
  assert shifted[0] == 0
  assert shifted[-1] == 1
  assert shifted[5] == pytest.approx(0.75)
  # Shifts compose by multiplication.
  np.testing.assert_allclose(
    flow.shift_time(shifted, 2.0), flow.shift_time(time, 6.0), rtol=1e-12
  )


# Distinct values counted in the reference's table, with its rounding.
@pytest.mark.parametrize(("shift", "distinct"), [(1.0, 924), (3.0, 733)])
def test_discrete_levels_are_those_of_the_reference(shift, distinct):
  u = (jnp.arange(1000) + 0.5) / 1000
  sigma, timestep = flow.discrete_sigma(u, shift=shift)
  raw = np.arange(1000) / 1000
  np.testing.assert_allclose(
    sigma, shift * raw / (1 + (shift - 1) * raw), rtol=1e-6
  )
  assert len(np.unique(timestep)) == distinct
  assert np.all(timestep == np.floor(timestep))
  # Truncation, up to a level that lies within rounding of an integer.
  assert np.all(timestep <= 1000 * sigma + 1e-3)
  assert np.all(timestep > 1000 * sigma - 1 - 1e-3)


def test_u_of_one_falls_into_the_last_level():
  sigma, timestep = flow.discrete_sigma(jnp.array([1.0, 0.9999]), shift=3.0)
  np.testing.assert_allclose(sigma, 0.9996664, rtol=1e-6)
  np.testing.assert_array_equal(timestep, 999)


def test_continuous_levels_are_not_rounded():
  sigma, timestep = flow.continuous_sigma(jnp.array([0.5004]), shift=1.0)
  np.testing.assert_allclose(sigma, 0.5004, rtol=1e-6)
  np.testing.assert_allclose(timestep, 500.4, rtol=1e-6)


def test_training_levels_follow_the_logit_normal_law():
  sigma, timestep = flow.sample_sigma(jax.random.key(0), 200_000, shift=3.0)
  assert sigma.dtype == timestep.dtype == jnp.float32
  # Known for shift 3: mean 0.714, median 0.75, 5-95 % 0.37-0.94. The standard
  # errors are near 0.001.
  assert float(sigma.mean()) == pytest.approx(0.714, abs=0.004)
  quantiles = np.quantile(sigma, [0.05, 0.5, 0.95])
  np.testing.assert_allclose(quantiles, [0.37, 0.75, 0.94], atol=0.01)


def test_mean_and_std_act_on_the_logit():
  key = jax.random.key(0)
  narrow = flow.logit_normal(key, 1000, mean=2.0, std=1e-3)
  np.testing.assert_allclose(narrow, jax.nn.sigmoid(2.0), rtol=1e-3)
  u = flow.uniform(key, 10_000)
  np.testing.assert_allclose(np.quantile(u, [0.1, 0.9]), [0.1, 0.9], atol=0.02)


def test_loss_is_the_mean_of_the_samples_errors():
  prediction, target = _latents(0), _latents(1)
  errors = flow.squared_error(prediction, target)
  assert errors.shape == (3,)
  expected = np.mean((np.asarray(prediction) - target)[1] ** 2)
  np.testing.assert_allclose(errors[1], expected, rtol=1e-6)
  np.testing.assert_allclose(
    flow.loss(prediction, target), errors.mean(), rtol=1e-6
  )


def test_loss_is_float32_for_bfloat16_predictions():
  target = _latents(1)
  prediction = (target + 1e-3).astype(jnp.bfloat16)
  expected = np.mean((np.asarray(prediction, np.float32) - target) ** 2)
  loss = flow.loss(prediction, target)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
