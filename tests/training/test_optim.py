"""Optimisers from a config: rates, masks, patterns, and layers on their own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from sana_jax import config as config_lib
from sana_jax.models import sana
from sana_jax.training import optim
from tests import tiny

AXES = {
  "m": (
    ("^blocks/kernel$", ("layers", "embed", "heads")),
    ("^blocks/table$", ("layers", None, None)),
    ("^blocks/bias$", ("layers", None)),
    ("^embedding$", ("vocab", "embed")),
    ("^head$", ("embed", None)),
  )
}
SHAPES = {
  "blocks": {"kernel": (3, 4, 6), "table": (3, 2, 4), "bias": (3, 6)},
  "embedding": (5, 4),
  "head": (4, 2),
}


def draw(rng, shapes=SHAPES):
  return {
    "m": jax.tree.map(
      lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    )
  }


def make_tx(param_axes=AXES, **changes):
  values = {"peak_lr": 0.1, "warmup_steps": 0, "clip_norm": 1e9} | changes
  config = config_lib.OptimConfig(**values)
  config.validate()
  return optim.make_optimizer(
    config, num_steps=100, batch_size=256, param_axes=param_axes
  )


def updates_of(tx, params, gradients):
  """The last updates after a step for each of the gradients."""
  state, update = tx.init(params), jax.jit(tx.update)
  for gradient in gradients:
    updates, state = update(gradient, state, params)
  return updates


def assert_close(a, b, rtol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b
  )


# --- Learning rates


def schedule_of(num_steps=110, batch_size=256, **changes):
  config = config_lib.OptimConfig(peak_lr=1.0, **changes)
  config.validate()
  return optim.make_schedule(config, num_steps=num_steps, batch_size=batch_size)


@pytest.mark.parametrize(
  ("step", "rate"), [(0, 0.0), (5, 0.5), (10, 1.0), (60, 0.55), (110, 0.1)]
)
def test_warm_up_then_cosine_down_to_the_final_rate(step, rate):
  schedule = schedule_of(warmup_steps=10, schedule="cosine", final_lr_ratio=0.1)
  np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  ("step", "rate"),
  [(0, 0.0), (5, 0.5), (10, 1.0), (90, 1.0), (100, 0.6), (110, 0.2)],
)
def test_warm_up_then_stable_then_a_linear_decay(step, rate):
  schedule = schedule_of(
    warmup_steps=10, schedule="wsd", decay_steps=20, final_lr_ratio=0.2
  )
  np.testing.assert_allclose(schedule(step), rate, rtol=1e-6, atol=1e-7)


def test_a_constant_rate_without_warm_up_starts_at_the_peak():
  schedule = schedule_of(warmup_steps=0)
  np.testing.assert_allclose([schedule(0), schedule(9)], [1, 1], rtol=1e-6)


def test_warm_up_and_decay_that_overlap_are_an_error():
  with pytest.raises(
    ValueError,
    match=r"warmup_steps \(60\).*decay_steps \(60\).*num_steps \(110\)",
  ):
    schedule_of(warmup_steps=60, schedule="wsd", decay_steps=60)


@pytest.mark.parametrize(
  ("rule", "batch_size", "rate"),
  [
    *(("none", 1024, 1.0), ("sqrt", 1024, 2.0), ("linear", 1024, 4.0)),
    *(("sqrt", 16, 0.25), ("sqrt", 256, 1.0)),
  ],
)
def test_the_rate_scales_with_the_batch(rule, batch_size, rate):
  schedule = schedule_of(
    warmup_steps=0, batch_scaling=rule, batch_size=batch_size
  )
  np.testing.assert_allclose(schedule(3), rate, rtol=1e-6)


# --- What is done to all


def test_the_norm_of_the_whole_gradient_is_clipped():
  params = {"w": jnp.zeros(2)}
  tx = make_tx({}, clip_norm=0.5)
  _, state = tx.update({"w": jnp.array([3.0, 4.0])}, tx.init(params), params)
  moment = optax.tree.get(state, "mu")["w"]
  # (1 - b1) times the gradient (3, 4) scaled to the norm 0.5.
  np.testing.assert_allclose(moment, [0.03, 0.04], rtol=1e-5)


@pytest.mark.parametrize("name", config_lib.optim.OPTIMIZERS)
def test_weight_decay_pulls_every_parameter_that_is_not_excluded(rng, name):
  params, gradient = draw(rng), draw(rng)
  plain, decayed = (
    updates_of(
      make_tx(name=name, weight_decay=decay, **excluded), params, [gradient]
    )
    for decay, excluded in (
      (0.0, {}),
      (0.5, {"weight_decay_exclude": ("bias$", "^m/head")}),
    )
  )
  pull = jax.tree.map(lambda a, b: a - b, decayed, plain)["m"]
  expected = jax.tree.map(lambda x: -0.1 * 0.5 * x, params["m"])
  for excluded in (expected["blocks"], expected):
    for leaf in ("bias", "head"):
      if leaf in excluded:
        excluded[leaf] *= 0
  jax.tree.map(
    # The difference of two updates of size 1.
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
    pull,
    expected,
  )


@pytest.mark.parametrize("name", config_lib.optim.OPTIMIZERS)
def test_every_optimizer_lowers_a_loss_of_every_kind_of_leaf(rng, name):
  start, goal = draw(rng), draw(rng)
  tx = make_tx(
    name=name, peak_lr=0.02, schedule="cosine", warmup_steps=20, clip_norm=1.0
  )

  def loss(params):
    return sum(
      jnp.square(a - b).mean()
      for a, b in zip(
        jax.tree.leaves(params), jax.tree.leaves(goal), strict=True
      )
    )

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (optax.apply_updates(params, updates), state), None

  (end, _), _ = jax.jit(
    lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 100)
  )(start)
  assert loss(end) < 0.5 * loss(start)


def test_multipliers_scale_the_rate_of_what_matches_first(rng):
  params, gradient = draw(rng), draw(rng)
  plain = updates_of(make_tx(), params, [gradient])
  scaled = updates_of(
    make_tx(lr_multipliers={"blocks/kernel": 0.5, "blocks": 3.0}),
    params,
    [gradient],
  )
  factors = {
    "blocks": {"kernel": 0.5, "table": 3.0, "bias": 3.0},
    "embedding": 1.0,
    "head": 1.0,
  }
  expected = jax.tree.map(lambda u, f: u * f, plain["m"], factors)
  assert_close(scaled["m"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", config_lib.optim.OPTIMIZERS)
def test_what_is_frozen_stays_and_has_no_state(rng, name):
  params, gradients = draw(rng), [draw(rng), draw(rng)]
  tx = make_tx(name=name, frozen=("^m/blocks/", "embedding"))
  updates = updates_of(tx, params, gradients)["m"]
  for leaf in jax.tree.leaves((updates["blocks"], updates["embedding"])):
    assert not leaf.any()
  assert updates["head"].all()
  only_head = make_tx(name=name).init({"m": {"head": params["m"]["head"]}})
  sizes = [
    sorted(leaf.size for leaf in jax.tree.leaves(state) if leaf.size > 1)
    for state in (tx.init(params), only_head)
  ]
  assert sizes[0] == sizes[1]


def test_the_gradient_of_what_is_frozen_is_not_clipped_with_the_rest(rng):
  params, gradient = draw(rng), draw(rng)
  large = jax.tree.map(jnp.copy, gradient)
  large["m"]["embedding"] *= 1e6
  tx = make_tx(frozen=("embedding",), clip_norm=0.1, eps=1.0)
  assert_close(
    updates_of(tx, params, [gradient]), updates_of(tx, params, [large])
  )


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("frozen", ("kernal$", "head"), r"optim.frozen has 'kernal\$'.*kernel"),
    ("lr_multipliers", {"m/blok/": 2.0}, "optim.lr_multipliers has 'm/blok/'"),
    (
      "weight_decay_exclude",
      ("embeding",),
      "weight_decay_exclude has 'embeding', which matches no .*m/embedding",
    ),
    ("frozen", (".",), "optim.frozen .* matches every parameter"),
  ],
)
def test_patterns_that_say_nothing_are_errors(rng, field, value, message):
  tx = make_tx(**{field: value})
  with pytest.raises(ValueError, match=message):
    tx.init(draw(rng))


def test_a_parameter_without_a_row_is_an_error_where_rows_are_needed(rng):
  tx = make_tx({"m": AXES["m"][:-1]}, name="came")
  with pytest.raises(ValueError, match="No sharding row matches m/head"):
    tx.init(draw(rng))


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_the_first_moment_can_have_16_bits(rng, name):
  params, gradient = draw(rng), draw(rng)
  state = make_tx(name=name, moment_dtype="bfloat16").init(params)
  wide = make_tx(name=name).init(params)
  halved = [
    (a.dtype, b.dtype)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wide), strict=True)
    if a.dtype != b.dtype
  ]
  assert len(halved) == 5
  assert set(halved) == {(jnp.dtype("bfloat16"), jnp.dtype("float32"))}
  updates = updates_of(
    make_tx(name=name, moment_dtype="bfloat16"), params, [gradient]
  )
  assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


# --- Layers on their own


@pytest.mark.parametrize("name", config_lib.optim.OPTIMIZERS)
def test_a_stack_of_layers_is_updated_like_each_layer_alone(rng, name):
  # Large enough for factors, and for blocks of 8 bits.
  shapes = {"blocks": {"kernel": (2, 130, 140), "bias": (2, 140)}}
  params, gradients = draw(rng, shapes), [draw(rng, shapes) for _ in range(3)]
  for gradient in gradients:
    # One layer's statistics must not be the other's.
    gradient["m"]["blocks"]["kernel"] *= jnp.array([1, 100.0])[:, None, None]
  stacked = updates_of(make_tx(name=name), params, gradients)
  rows = (
    ("kernel$", ("embed", "heads")),
    ("bias$", (None,)),
  )
  for layer in range(2):
    params_of, *gradients_of = jax.tree.map(
      lambda x, layer=layer: x[layer], [params, *gradients]
    )
    alone = updates_of(make_tx({"m": rows}, name=name), params_of, gradients_of)
    jax.tree.map(
      # Orthogonalisation multiplies in another order.
      lambda a, b, layer=layer: np.testing.assert_allclose(
        a[layer], b, rtol=1e-3, atol=1e-5
      ),
      stacked,
      alone,
    )


def test_muon_orthogonalizes_the_matrices_of_blocks_only(rng):
  params, gradient = draw(rng), draw(rng)
  updates = updates_of(
    make_tx(name="muon", weight_decay=0.0), params, [gradient]
  )
  adam = updates_of(make_tx(weight_decay=0.0), params, [gradient])
  by_muon = updates["m"]["blocks"].pop("kernel")
  adam["m"]["blocks"].pop("kernel")
  assert_close(updates, adam)
  for layer, matrix in zip(
    gradient["m"]["blocks"]["kernel"], by_muon, strict=True
  ):
    direction = contrib.muon(1.0)
    expected, _ = direction.update(
      {"w": layer}, direction.init({"w": layer}), {"w": layer}
    )
    cosine = jnp.vdot(expected["w"], matrix) / (
      jnp.linalg.norm(expected["w"]) * jnp.linalg.norm(matrix)
    )
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    singular = np.linalg.svd(np.asarray(matrix), compute_uv=False)
    # 0.1 (the rate) x 0.2 sqrt(6), up to what five iterations leave.
    size = singular / (0.1 * 0.2 * 6**0.5)
    assert ((size > 0.5) & (size < 1.3)).all()


@pytest.mark.parametrize(
  ("name", "bytes_per_parameter"),
  [
    *(("adamw", 8.0), ("lion", 4.0), ("muon", 4.12), ("adafactor", 0.01)),
    *(("came", 4.01), ("came_8bit", 1.02)),
  ],
)
def test_bytes_of_state_of_the_model_of_1600m(name, bytes_per_parameter):
  model = config_lib.sana_1600m()
  params = jax.eval_shape(
    lambda: {
      "transformer": sana.SanaTransformer.from_config(model, rngs=nnx.Rngs(0))
    }
  )
  tx = make_tx({"transformer": sana.PARAM_AXES}, name=name)
  count = sum(leaf.size for leaf in jax.tree.leaves(params))
  state = jax.eval_shape(tx.init, params)
  size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
  assert round(size / count, 2) == bytes_per_parameter


def test_names_of_a_model_can_be_selected():
  """The table of the model says what every leaf is, for every optimiser."""
  config = tiny.transformer_config()
  params = jax.eval_shape(
    lambda: {
      "transformer": sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0))
    }
  )
  tx = make_tx(
    {"transformer": sana.PARAM_AXES},
    name="muon",
    frozen=("^transformer/(time|caption)_embed/",),
    lr_multipliers={"/scale_shift_table$": 0.5},
  )
  state = jax.eval_shape(tx.init, params)
  names = {
    path[-1].key
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]
    if isinstance(path[-1], jax.tree_util.DictKey)
  }
  assert "transformer/blocks/self_attention/qkv/kernel" in names
  assert not [name for name in names if "_embed/linear" in name]
