"""One step: what is averaged, clipped, scheduled and drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sana_jax import config as config_lib
from sana_jax.training import optim
from sana_jax.training import step as step_lib


def linear_loss(params, frozen, key, batch):
  """Has the gradient `batch`; tells the key's first draw."""
  draw = jax.random.uniform(key)
  return jnp.sum(params["w"] * batch) + 0 * frozen, {"draw": draw}


def run(tx, steps=1, gradient=(3.0, 4.0), ema_decay=0.9999):
  step = jax.jit(step_lib.make_train_step(linear_loss, tx, ema_decay))
  state = step_lib.init_state({"w": jnp.zeros(2)}, tx)
  states, metrics = [state], []
  for _ in range(steps):
    state, scalars = step(
      state, jnp.float32(0), jax.random.key(1), jnp.array(gradient)
    )
    states.append(state)
    metrics.append(scalars)
  return states, metrics


def test_the_average_follows_the_new_parameters():
  states, _ = run(optax.sgd(1.0), steps=3)
  expected = np.zeros(2)
  for time, state in enumerate(states[1:]):
    decay = min(0.9999, (1 + time) / (10 + time))
    expected = decay * expected + (1 - decay) * np.array(state.params["w"])
    # Float32 against float64, a few roundings.
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)


def test_the_decay_of_the_average_has_an_upper_limit():
  states, _ = run(optax.sgd(1.0), steps=1, ema_decay=0.05)
  np.testing.assert_allclose(
    states[1].ema["w"], 0.95 * states[1].params["w"], rtol=1e-6
  )


def test_the_average_does_not_share_the_parameters_memory():
  params = {"w": jnp.ones(2)}
  state = step_lib.init_state(params, optax.sgd(1.0))
  step = jax.jit(
    step_lib.make_train_step(linear_loss, optax.sgd(1.0), 0.5),
    donate_argnums=0,
  )
  new, _ = step(state, jnp.float32(0), jax.random.key(0), jnp.ones(2))
  np.testing.assert_allclose(new.params["w"], np.zeros(2))


def test_steps_draw_different_numbers_and_repeat_them_when_resumed():
  _, metrics = run(optax.sgd(1.0), steps=3)
  draws = [float(m["draw"]) for m in metrics]
  assert len(set(draws)) == 3
  step = step_lib.make_train_step(linear_loss, optax.sgd(1.0), 0.5)
  resumed = step_lib.init_state({"w": jnp.zeros(2)}, optax.sgd(1.0))
  resumed = resumed._replace(step=jnp.int32(2))
  _, again = step(resumed, jnp.float32(0), jax.random.key(1), jnp.ones(2))
  assert float(again["draw"]) == draws[2]


def test_the_norm_of_the_whole_gradient_is_reported_and_clipped():
  config = config_lib.OptimConfig(
    peak_lr=1.0, warmup_steps=0, clip_norm=0.5, weight_decay=0.0
  )
  tx = optim.make_optimizer(config, 10)
  states, metrics = run(tx)
  assert float(metrics[0]["grad_norm"]) == pytest.approx(5.0)
  moment = optax.tree.get(states[1].opt_state, "mu")["w"]
  # (1 - b1) times the gradient (3, 4) scaled to the norm 0.5.
  np.testing.assert_allclose(moment, [0.03, 0.04], rtol=1e-5)


def test_weight_decay_pulls_every_parameter():
  config = config_lib.OptimConfig(
    peak_lr=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=1.0
  )
  tx = optim.make_optimizer(config, 10)
  params = {"scale": jnp.full(2, 2.0), "kernel": jnp.full((2, 2), 2.0)}
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  for update in jax.tree.leaves(updates):
    np.testing.assert_allclose(update, -0.1 * 0.5 * 2.0, rtol=1e-6)


@pytest.mark.parametrize(
  ("step", "rate"), [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1)]
)
def test_warm_up_then_cosine_down_to_the_final_rate(step, rate):
  config = config_lib.OptimConfig(
    peak_lr=1.0, warmup_steps=10, schedule="cosine", final_lr_ratio=0.1
  )
  schedule = optim.make_schedule(config, 110)
  np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, atol=1e-7)


def test_a_constant_rate_without_warm_up_starts_at_the_peak():
  config = config_lib.OptimConfig(peak_lr=0.3, warmup_steps=0)
  schedule = optim.make_schedule(config, 10)
  np.testing.assert_allclose([schedule(0), schedule(9)], [0.3, 0.3], rtol=1e-6)
