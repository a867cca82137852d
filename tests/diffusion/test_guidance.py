import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import guidance, samplers, schedules


def _network(sizes):
  """A velocity that mixes all its inputs; records its batch sizes."""

  def velocity_under(condition):
    text, mask = condition
    bias = jnp.sum(text * mask[..., None], axis=(1, 2))

    def velocity(x, sigma, timestep):
      sizes.append(x.shape[0])
      return 0.5 * x + (bias + sigma + timestep)[:, None, None, None]

    return velocity

  return velocity_under


def _inputs():
  keys = jax.random.split(jax.random.key(0), 3)
  x = jax.random.normal(keys[0], (2, 3, 4, 1))
  text = jax.random.normal(keys[1], (2, 5, 3))
  null = jax.random.normal(keys[2], (2, 5, 3))
  mask = jnp.ones((2, 5), bool)
  sigma = jnp.full((2,), 0.6)
  return (
    (x, sigma, 1000 * sigma),
    (text, mask),
    (null, mask.at[:, 1:].set(False)),
  )


def test_guidance_extrapolates_from_null_to_condition():
  args, condition, null = _inputs()
  network = _network([])
  guided = guidance.classifier_free(network, condition, null, scale=4.5)
  v_cond, v_null = network(condition)(*args), network(null)(*args)
  # Subtraction of numbers around 600 in float32, times the scale.
  np.testing.assert_allclose(
    guided(*args), v_null + 4.5 * (v_cond - v_null), rtol=1e-5
  )


def test_both_passes_are_one_call_of_twice_the_batch():
  args, condition, null = _inputs()
  sizes = []
  guidance.classifier_free(_network(sizes), condition, null, scale=2.0)(*args)
  assert sizes == [4]


def test_what_depends_on_the_condition_alone_is_computed_once():
  args, condition, null = _inputs()
  sizes = []

  def network(given):
    sizes.append(given[0].shape[0])
    return _network([])(given)

  guided = guidance.classifier_free(network, condition, null, scale=2.0)
  for _ in range(3):
    guided(*args)
  assert sizes == [4]


@pytest.mark.parametrize("scale", [1, 1.0, 0.0])
def test_a_scale_of_one_or_less_is_a_single_conditional_pass(scale):
  args, condition, null = _inputs()
  sizes = []
  network = _network(sizes)
  guided = guidance.classifier_free(network, condition, null, scale=scale)
  np.testing.assert_array_equal(guided(*args), network(condition)(*args))
  assert sizes == [2, 2]


def test_a_traced_scale_gives_what_a_number_gives():
  args, condition, null = _inputs()
  network = _network([])

  @jax.jit
  def traced(scale):
    return guidance.classifier_free(network, condition, null, scale=scale)(
      *args
    )

  for scale in (1.0, 3.0):
    fixed = guidance.classifier_free(network, condition, null, scale=scale)
    # v_null + (v_cond - v_null), of numbers around 600, rounds.
    np.testing.assert_allclose(traced(scale), fixed(*args), rtol=1e-5)


@pytest.mark.parametrize("with_null", [True, False])
@pytest.mark.parametrize("adaptive", [0.0, 0.004, 0.01])
def test_perturbed_attention_guidance_is_its_formula(with_null, adaptive):
  (x, sigma, _), condition, null = _inputs()
  perturbed = (condition[0] * 0.7, condition[1])
  timestep = jnp.array([800.0, 300.0])
  sizes = []
  network = _network(sizes)
  guided = guidance.perturbed_attention(
    network,
    condition,
    perturbed,
    null if with_null else None,
    scale=4.5,
    pag_scale=3.0,
    pag_adaptive_scale=adaptive,
  )(x, sigma, timestep)
  assert sizes == [6 if with_null else 4]
  v_cond, v_perturbed, v_null = (
    np.asarray(network(c)(x, sigma, timestep), np.float64)
    for c in (condition, perturbed, null)
  )
  weight = np.maximum(3.0 - adaptive * (1000 - np.asarray(timestep)), 0)
  expected = v_cond + weight[:, None, None, None] * (v_cond - v_perturbed)
  if with_null:
    expected += 3.5 * (v_cond - v_null)
  # Differences of float32 numbers around 800, times 4.5.
  np.testing.assert_allclose(guided, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ("sigma", "active"),
  [(0.2, False), (0.20001, True), (0.5, True), (0.8, False), (0.9, False)],
)
def test_the_interval_is_open_at_both_ends(sigma, active):
  (x, _, _), condition, null = _inputs()
  args = (x, jnp.full((2,), sigma), jnp.full((2,), 1000 * sigma))
  network = _network([])
  inside = guidance.classifier_free(network, condition, null, scale=3.0)
  outside = network(condition)
  limited = guidance.within((0.2, 0.8), inside, outside)
  expected = (inside if active else outside)(*args)
  np.testing.assert_allclose(limited(*args), expected, rtol=1e-6)


def test_the_second_pass_is_not_computed_outside_the_interval():
  args, condition, null = _inputs()
  ran = []
  network = _network([])

  def counting(condition):
    def velocity(x, *rest):
      jax.debug.callback(lambda: ran.append(x.shape[0]))
      return network(condition)(x, *rest)

    return velocity

  guided = guidance.within(
    (0.0, 0.5),
    guidance.classifier_free(counting, condition, null, scale=3.0),
    counting(condition),
  )
  schedule = schedules.FlowEuler().schedule(6)
  jax.jit(lambda x: samplers.sample(guided, x, schedule))(args[0])
  jax.effects_barrier()
  guided_steps = int(np.sum(schedule.sigmas[:-1] < 0.5))
  assert guided_steps == 2
  assert sorted(ran) == [2] * 4 + [4] * 2


def test_guidance_of_a_bfloat16_network_is_float32():
  args, condition, null = _inputs()
  network = _network([])

  def half(condition):
    return lambda *a: network(condition)(*a).astype(jnp.bfloat16)

  guided = guidance.classifier_free(half, condition, null, scale=3.0)
  perturbed = guidance.perturbed_attention(
    half, condition, condition, null, scale=3.0, pag_scale=2.0
  )
  unguided = half(condition)
  limited = guidance.within((0.0, 0.5), guided, unguided)
  for function in (guided, perturbed, limited):
    assert function(*args).dtype == jnp.float32


def test_an_empty_interval_is_an_error():
  with pytest.raises(ValueError, match=r"interval \(0.5, 0.5\) is empty"):
    guidance.within((0.5, 0.5), lambda *a: a[0], lambda *a: a[0])
