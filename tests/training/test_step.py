"""One step: what is averaged, drawn, skipped and told."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sana_jax.training import scalars as scalars_lib
from sana_jax.training import step as step_lib


def linear_loss(params, frozen, key, batch):
  """Has the gradient `batch`; tells the key's first draw."""
  draw = jax.random.uniform(key)
  seen = scalars_lib.Ratio(batch.sum(), jnp.float32(batch.size))
  told = {"draw": draw, "mean": seen}
  return jnp.sum(params["w"] * batch) + 0 * frozen, told


def make_step(tx, loss_fn=linear_loss, *, ema_decay=0.9999, **options):
  return step_lib.make_train_step(
    loss_fn,
    tx,
    learning_rate=optax.linear_schedule(1.0, 2.0, 10),
    ema_decay=ema_decay,
    **options,
  )


def run(tx, steps=1, gradient=(3.0, 4.0), ema_decay=0.9999):
  step = jax.jit(make_step(tx, ema_decay=ema_decay))
  state = step_lib.init_state({"w": jnp.zeros(2)}, tx)
  states, scalars = [state], []
  for _ in range(steps):
    state, told = step(
      state, jnp.float32(0), jax.random.key(1), jnp.array(gradient)
    )
    states.append(state)
    scalars.append(told)
  return states, scalars


def test_the_average_follows_the_new_parameters():
  states, _ = run(optax.sgd(1.0), steps=3)
  expected = np.zeros(2)
  for time, state in enumerate(states[1:]):
    decay = min(0.9999, (1 + time) / (10 + time))
    expected = decay * expected + (1 - decay) * np.array(state.params["w"])
    # Float32 against float64, a few roundings.
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("decay", [0.05, 0.0])
def test_the_decay_of_the_average_has_an_upper_limit(decay):
  states, _ = run(optax.sgd(1.0), steps=1, ema_decay=decay)
  np.testing.assert_allclose(
    states[1].ema["w"], (1 - decay) * states[1].params["w"], rtol=1e-6
  )


def test_the_average_does_not_share_the_parameters_memory():
  params = {"w": jnp.ones(2)}
  state = step_lib.init_state(params, optax.sgd(1.0))
  step = jax.jit(make_step(optax.sgd(1.0), ema_decay=0.5), donate_argnums=0)
  new, _ = step(state, jnp.float32(0), jax.random.key(0), jnp.ones(2))
  np.testing.assert_allclose(new.params["w"], np.zeros(2))


def test_steps_draw_different_numbers_and_repeat_them_when_resumed():
  _, scalars = run(optax.sgd(1.0), steps=3)
  draws = [float(told["draw"]) for told in scalars]
  assert len(set(draws)) == 3
  resumed = step_lib.init_state({"w": jnp.zeros(2)}, optax.sgd(1.0))
  resumed = resumed._replace(step=jnp.int32(2))
  _, again = make_step(optax.sgd(1.0))(
    resumed, jnp.float32(0), jax.random.key(1), jnp.array([3.0, 4.0])
  )
  assert float(again["draw"]) == draws[2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(bad):
  tx = optax.adam(0.1)
  step = jax.jit(make_step(tx))
  state = step_lib.init_state({"w": jnp.array([1.0, 2.0])}, tx)
  good = jnp.array([3.0, 4.0])
  key, fixed = jax.random.key(1), jnp.float32(0)
  before, told = step(state, fixed, key, good)
  assert int(told["skipped"]) == 0
  assert float(told["learning_rate"]) == 1.0
  after, told = step(before, fixed, key, good.at[1].set(bad))
  assert (int(after.step), int(after.skipped)) == (2, 1)
  assert int(told["skipped"]) == 1
  assert float(told["mean"].count) == 0
  for part in ("params", "ema", "opt_state"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(before, part), getattr(after, part)
    )
  # The rate is of the updates that were made: this is the second.
  third, told = step(after, fixed, key, good)
  assert float(told["learning_rate"]) == pytest.approx(1.1)
  assert (int(third.step), int(third.skipped)) == (3, 1)
  assert not np.array_equal(third.params["w"], after.params["w"])


def test_a_loss_that_is_not_finite_with_a_finite_gradient_is_skipped():
  def loss_fn(params, frozen, key, batch):
    return params["w"].sum() + jnp.nan, {}

  tx = optax.sgd(1.0)
  state = step_lib.init_state({"w": jnp.ones(2)}, tx)
  new, told = make_step(tx, loss_fn)(state, None, jax.random.key(0), None)
  assert float(told["grad_norm"]) == pytest.approx(2**0.5)
  assert int(new.skipped) == 1
  np.testing.assert_array_equal(new.params["w"], np.ones(2))


def test_an_update_that_is_not_finite_with_a_finite_gradient_is_skipped():
  """An optimiser that divides by zero; one with a state, which stays, too."""
  divide = optax.stateless(
    lambda updates, _: jax.tree.map(lambda u: u / jnp.arange(2.0), updates)
  )
  tx = optax.chain(optax.trace(0.5), divide)
  state = step_lib.init_state({"w": jnp.ones(2)}, tx)
  new, told = jax.jit(make_step(tx))(
    state, jnp.float32(0), jax.random.key(0), jnp.array([3.0, 4.0])
  )
  assert float(told["loss"]) == 7
  assert float(told["grad_norm"]) == 5
  assert (int(new.step), int(new.skipped), int(told["skipped"])) == (1, 1, 1)
  for part in ("params", "ema", "opt_state"):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(state, part), getattr(new, part)
    )


def quadratic_loss(params, frozen, key, batch):
  """Mean square error of a line; tells the mean of the positive inputs."""
  weights = params["model"]["blocks"]["line"]
  error = batch["x"] @ weights - batch["y"]
  positive = batch["x"] > 0
  return jnp.square(error).mean(), {
    "positive": scalars_lib.Ratio(
      jnp.where(positive, batch["x"], 0).sum(), positive.sum(dtype=jnp.float32)
    ),
    "largest": batch["x"].mean(),
  }


def make_problem(rng, rows=12):
  batch = {
    "x": jnp.asarray(rng.normal(size=(rows, 3)), jnp.float32),
    "y": jnp.asarray(rng.normal(size=(rows, 2)), jnp.float32),
  }
  weights = jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)
  return {"model": {"blocks": {"line": weights}}}, batch


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_a_batch_in_parts_is_the_whole_batch(rng, parts):
  params, batch = make_problem(rng)
  tx = optax.adam(0.1)
  results = [
    jax.jit(make_step(tx, quadratic_loss, accumulation=n))(
      step_lib.init_state(params, tx), None, jax.random.key(0), batch
    )
    for n in (1, parts)
  ]
  # Sums in another order.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    *results,
  )


def test_parts_draw_different_numbers(rng):
  params, batch = make_problem(rng, rows=4)

  def loss_fn(params, frozen, key, batch):
    loss, _ = quadratic_loss(params, frozen, key, batch)
    return loss, {"draw": scalars_lib.Ratio(jax.random.uniform(key), 1.0)}

  tx = optax.sgd(1.0)
  step = make_step(tx, loss_fn, accumulation=2)
  key = jax.random.key(3)
  _, told = step(step_lib.init_state(params, tx), None, key, batch)
  step_key = jax.random.fold_in(key, 0)
  draws = [
    float(jax.random.uniform(jax.random.fold_in(step_key, i))) for i in (0, 1)
  ]
  assert draws[0] != draws[1]
  assert float(told["draw"].total) == pytest.approx(sum(draws))
  assert float(told["draw"].count) == 2


def test_a_batch_that_does_not_divide_into_parts_is_an_error(rng):
  params, batch = make_problem(rng, rows=5)
  tx = optax.sgd(1.0)
  step = make_step(tx, quadratic_loss, accumulation=2)
  with pytest.raises(
    ValueError, match=r"batch_size \(5\).*multiple of optim.accumulation \(2\)"
  ):
    step(step_lib.init_state(params, tx), None, jax.random.key(0), batch)


def test_norms_of_gradients_are_told_by_part_and_without_what_is_frozen(rng):
  values = {
    "blocks": {"ffn": {"up": 2, "down": 3}, "table": 5},
    "head": {"kernel": 7, "bias": 11},
  }
  params = {"model": jax.tree.map(jnp.float32, values)}

  def loss_fn(params, frozen, key, batch):
    # The gradient of x^2 / 2 is x.
    return sum(x**2 / 2 for x in jax.tree.leaves(params)), {}

  tx = optax.sgd(1.0)
  _, told = make_step(tx, loss_fn, frozen=("head/bias",))(
    step_lib.init_state(params, tx), None, jax.random.key(0), None
  )
  squares = {
    "grad_norm/model/ffn": 4 + 9,
    "grad_norm/model/table": 25,
    "grad_norm/model/head": 49,
    "grad_norm": 4 + 9 + 25 + 49,
    "param_norm": 4 + 9 + 25 + 49 + 121,
  }
  assert {n for n in told if "norm" in n} == set(squares)
  for name, square in squares.items():
    assert float(told[name]) == pytest.approx(square**0.5), name


@pytest.mark.parametrize(
  ("name", "group"),
  [
    ("transformer/blocks/ffn/point/kernel", "transformer/ffn"),
    ("transformer/patch_embed/projection/bias", "transformer/patch_embed"),
    ("text_encoder/blocks/pre_mlp_norm/scale", "text_encoder/norms"),
    ("text_encoder/norm/scale", "text_encoder/norms"),
    ("w", "w"),
  ],
)
def test_a_parameter_is_in_a_part_of_its_component(name, group):
  assert step_lib.group_of(name) == group


def test_means_of_no_samples_are_left_out():
  values = scalars_lib.to_floats(
    {
      "loss": jnp.float32(0.5),
      "some": scalars_lib.Ratio(jnp.float32(3), jnp.float32(2)),
      "none": scalars_lib.Ratio(jnp.float32(0), jnp.float32(0)),
    }
  )
  assert values == {"loss": 0.5, "some": 1.5}
