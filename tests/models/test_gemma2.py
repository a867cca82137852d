"""Gemma 2 against a plain definition, its properties, and its tables."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax import sharding, tree
from sana_jax.models import gemma2
from sana_jax.weights import gemma2 as gemma2_weights
from sana_jax.weights import mapping

CONFIG = config_lib.Gemma2Config(
  vocab_size=50,
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=2,
  head_dim=6,
  sliding_window=3,
  query_pre_attn_scalar=10.0,
  attn_logit_softcapping=2.0,
  final_logit_softcapping=1.5,
)
LENGTH = 7


run = jax.jit(lambda model, *inputs: model(*inputs))


def make_model(seed=0, *, dtype=jnp.float32, scan=True, **changes):
  """A tiny model; every parameter is random, the norms' too."""
  config = dataclasses.replace(CONFIG, **changes)
  model = gemma2.Gemma2.from_config(
    config, dtype=dtype, scan=scan, rngs=nnx.Rngs(seed)
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype),
    model,
  )


def make_inputs(rng):
  ids = rng.integers(4, CONFIG.vocab_size, (3, LENGTH)).astype(np.int32)
  mask = np.ones((3, LENGTH), np.int32)
  mask[1, 4:] = 0
  mask[2, :3] = 0
  return ids, mask


def defined(model, config, ids, mask):
  """The definition in NumPy, float64, one query at a time."""
  leaves = zip(tree.leaf_names(model), jax.tree.leaves(model), strict=True)
  params = {name: np.asarray(leaf, np.float64) for name, leaf in leaves}
  out = []
  for text, valid in zip(ids, mask, strict=True):
    x = params["embedding"][text] * np.sqrt(config.hidden_size)
    for i in range(config.num_hidden_layers):
      p = {
        name.removeprefix("blocks/"): stacked[i]
        for name, stacked in params.items()
        if name.startswith("blocks/")
      }
      window = config.sliding_window if i % 2 == 0 else len(text)
      y = defined_norm(x, p["pre_attention_norm/scale"])
      y = defined_attention(p, config, y, valid, window)
      x = x + defined_norm(y, p["post_attention_norm/scale"])
      y = defined_mlp(p, defined_norm(x, p["pre_mlp_norm/scale"]))
      x = x + defined_norm(y, p["post_mlp_norm/scale"])
    out.append(defined_norm(x, params["norm/scale"]))
  return np.stack(out)


def defined_norm(x, scale):
  mean_square = (x**2).mean(-1, keepdims=True)
  return x / np.sqrt(mean_square + CONFIG.rms_norm_eps) * (1 + scale)


def defined_attention(p, config, x, valid, window):
  q, k, v = (
    (x @ p[f"attention/{name}/kernel"]).reshape(len(x), -1, config.head_dim)
    for name in ("query", "key", "value")
  )
  group = config.num_attention_heads // config.num_key_value_heads
  cap = config.attn_logit_softcapping
  out = np.zeros_like(q)
  for i, head in np.ndindex(q.shape[:2]):
    keys = [j for j in range(i + 1) if valid[j] and i - j < window]
    rotated = [defined_rotation(k[j, head // group], j) for j in keys]
    scores = np.array(rotated) @ defined_rotation(q[i, head], i) if keys else 0
    scores = scores / np.sqrt(config.query_pre_attn_scalar)
    weights = np.exp(cap * np.tanh(scores / cap))
    if not keys:  # the softmax of equals: the average over everything
      keys, weights = list(range(len(x))), np.ones(len(x))
    out[i, head] = weights @ v[keys, head // group] / weights.sum()
  return out.reshape(len(x), -1) @ p["attention/out/kernel"]


def defined_rotation(vector, position):
  half = len(vector) // 2
  angles = position / CONFIG.rope_theta ** (np.arange(half) / half)
  pairs = (vector[:half] + 1j * vector[half:]) * np.exp(1j * angles)
  return np.concatenate([pairs.real, pairs.imag])


def defined_mlp(p, x):
  gate = x @ p["mlp/gate/kernel"]
  inner = np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)
  gelu = 0.5 * gate * (1 + np.tanh(inner))
  return (gelu * (x @ p["mlp/up/kernel"])) @ p["mlp/down/kernel"]


def test_hidden_states_follow_the_definition_under_any_padding(rng):
  model = make_model()
  ids, mask = make_inputs(rng)
  with jax.default_matmul_precision("highest"):
    hidden = run(model, jnp.asarray(ids), jnp.asarray(mask))
  # float32 against float64, three layers.
  np.testing.assert_allclose(
    hidden, defined(model, CONFIG, ids, mask), rtol=1e-4, atol=1e-4
  )


def test_scanned_and_unrolled_blocks_agree(rng):
  ids, mask = map(jnp.asarray, make_inputs(rng))
  scanned = run(make_model(scan=True), ids, mask)
  unrolled = run(make_model(scan=False), ids, mask)
  # The same operations, fused differently.
  np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-5)


def test_hidden_states_begin_with_the_embedding_and_end_with_the_output(rng):
  model = make_model()
  ids, mask = map(jnp.asarray, make_inputs(rng))
  states = jax.jit(lambda model: model.hidden_states(ids, mask))(model)
  assert len(states) == CONFIG.num_hidden_layers + 1
  embedded = 4 * np.asarray(model.embedding[...])[ids]
  np.testing.assert_allclose(states[0], embedded, rtol=1e-6)
  np.testing.assert_allclose(
    states[-1], run(model, ids, mask), rtol=1e-5, atol=1e-5
  )


def test_a_missing_mask_means_that_every_token_is_text(rng):
  model = make_model()
  ids = jnp.asarray(make_inputs(rng)[0])
  unmasked = run(model, ids)
  masked = run(model, ids, jnp.ones_like(ids))
  # Compiled apart from each other.
  np.testing.assert_allclose(unmasked, masked, rtol=1e-5, atol=1e-5)


def test_padding_changes_nothing_before_it(rng):
  model = make_model()
  ids, mask = make_inputs(rng)
  short = run(model, jnp.asarray(ids[1:2, :4]))
  padded = run(model, jnp.asarray(ids[1:2]), jnp.asarray(mask[1:2]))
  np.testing.assert_allclose(padded[:, :4], short, rtol=1e-5, atol=1e-5)


def test_sliding_layers_see_no_further_than_their_window(rng):
  ids = make_inputs(rng)[0][:1]
  changed = ids.copy()
  changed[0, 0] = 3
  last = {}
  for kind in ("sliding_attention", "full_attention"):
    model = make_model(num_hidden_layers=1, layer_types=(kind,))
    first, second = (run(model, jnp.asarray(x)) for x in (ids, changed))
    last[kind] = np.abs(first - second)[0].max(axis=-1)
  assert (last["sliding_attention"][CONFIG.sliding_window :] == 0).all()
  assert (last["full_attention"] > 0).all()


@jax.jit
def resumed(model, ids, mask, prefix_ids):
  """Reads the prefix once, then every text from its end on."""
  prefix = model.read_prefix(prefix_ids)
  count = prefix_ids.shape[0]
  return prefix, model(ids[:, count:], mask[:, count:], prefix)


def make_continued(rng, count, batch=3):
  """Texts whose first `count` ids are the same; one ends soon after them."""
  ids = rng.integers(4, CONFIG.vocab_size, (batch, LENGTH)).astype(np.int32)
  ids[:, :count] = ids[0, :count]
  mask = np.ones_like(ids)
  mask[1, count + 1 :] = 0
  return jnp.asarray(ids), jnp.asarray(mask)


# Windows of three slots begin within the longer prefix.
@pytest.mark.parametrize(("count", "scan"), [(1, False), (4, True)])
def test_texts_go_on_from_a_prefix_as_if_they_were_read_whole(rng, count, scan):
  model = make_model(scan=scan)
  ids, mask = make_continued(rng, count)
  with jax.default_matmul_precision("highest"):
    whole = run(model, ids, mask)
    prefix, rest = resumed(model, ids, mask, ids[0, :count])
  assert prefix.past.keys.shape == prefix.past.values.shape
  assert prefix.past.keys.shape == (3, 1, count, 2, 6)
  # The same sums over other shapes of arrays.
  close = {"rtol": 1e-5, "atol": 1e-5}
  np.testing.assert_allclose(prefix.first, whole[:1, :1], **close)
  np.testing.assert_allclose(rest, whole[:, count:], **close)
  others = jax.tree.map(lambda leaf: leaf + 0.1, prefix)
  changed = run(model, ids[:, count:], mask[:, count:], others)
  assert np.abs(changed - rest).max(axis=(1, 2)).min() > 1e-3


def test_texts_go_on_from_a_prefix_on_a_mesh(rng):
  ids, mask = make_continued(rng, 4, batch=8)
  model = make_model()
  expected = run(model, ids, mask)[:, 4:]
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  placed = jax.device_put(
    model, sharding.param_shardings(model, gemma2.PARAM_AXES, mesh)
  )

  @jax.jit
  def on_mesh(model, ids, mask, prefix_ids):
    with sharding.use(mesh):
      return resumed(model, ids, mask, prefix_ids)[1]

  batch = sharding.batch_sharding(mesh)
  found = on_mesh(
    placed, *jax.device_put((ids, mask), batch), np.asarray(ids[0, :4])
  )
  # The order of sums.
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_prefix_in_bfloat16_rounds_no_more_than_the_whole(rng):
  half = make_model(dtype=jnp.bfloat16)
  ids, mask = make_continued(rng, 4)
  prefix, rest = resumed(half, ids, mask, ids[0, :4])
  assert prefix.past.keys.dtype == prefix.past.values.dtype == jnp.bfloat16
  assert prefix.first.dtype == rest.dtype == jnp.float32
  exact = run(make_model(), ids, mask)[:, 4:]
  whole = run(half, ids, mask)[:, 4:]
  errors = [
    np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (rest, whole)
  ]
  assert errors[0] < max(2 * errors[1], 0.01) < 0.05


def test_what_was_read_before_is_not_computed_again():
  """The instruction of SANA and a caption of full length, in proportion."""
  model = jax.eval_shape(make_model)
  total, count, batch = 102, 42, 2

  def flops(function, *args) -> float:
    return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

  def ids(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)

  prefix = jax.eval_shape(
    lambda model, ids: model.read_prefix(ids), model, ids(count)
  )
  whole = flops(lambda model, x: model(x), model, ids(batch, total))
  rest = flops(
    lambda model, x, prefix: model(x, None, prefix),
    *(model, ids(batch, total - count), prefix),
  )
  # XLA counts a scan's body once, in both.
  assert rest / whole < 1.02 * (total - count) / total


def test_logits_are_capped_products_with_the_embedding(rng):
  model = make_model()
  hidden = 9 * rng.normal(size=(2, 3, 16)).astype(np.float32)
  scores = hidden @ np.asarray(model.embedding[...]).T
  with jax.default_matmul_precision("highest"):
    capped = model.logits(jnp.asarray(hidden))
    free = make_model(final_logit_softcapping=None).logits(jnp.asarray(hidden))
  np.testing.assert_allclose(
    capped, 1.5 * np.tanh(scores / 1.5), rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(free, scores, rtol=1e-4, atol=1e-4)


def test_bfloat16_keeps_the_residual_stream_in_float32(rng):
  ids, mask = map(jnp.asarray, make_inputs(rng))
  half = make_model(dtype=jnp.bfloat16)
  states = jax.jit(lambda model: model.hidden_states(ids, mask))(half)
  assert {state.dtype for state in states} == {jnp.dtype("float32")}
  exact = run(make_model(), ids, mask)
  rounded = run(half, ids, mask)
  difference = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
  # bfloat16 has 8 bits of mantissa: about 0.4 % per operation.
  assert 1e-4 < difference < 0.05


def test_gradients_reach_every_parameter(rng):
  ids, mask = map(jnp.asarray, make_inputs(rng))
  weights = jnp.asarray(rng.normal(size=(3, LENGTH, 16)), jnp.float32)

  def loss(model):
    return jnp.sum(model(ids, mask) * weights)

  gradients = jax.jit(jax.grad(loss))(make_model())
  for name, leaf in zip(
    tree.leaf_names(gradients), jax.tree.leaves(gradients), strict=True
  ):
    assert np.isfinite(leaf).all(), name
    assert np.abs(leaf).max() > 0, name


def test_a_fresh_model_starts_small_with_neutral_norms():
  model = gemma2.Gemma2.from_config(CONFIG, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(np.std(model.embedding[...]), 0.02, rtol=0.1)
  kernel = model.blocks.mlp.up.kernel[...]
  np.testing.assert_allclose(np.std(kernel), 0.02, rtol=0.1)
  assert not np.array_equal(kernel[0], kernel[1])
  np.testing.assert_array_equal(model.norm.scale[...], 0)


def test_every_parameter_has_axes_of_its_rank():
  mesh = sharding.make_mesh({"data": -1, "fsdp": 1})
  model = jax.eval_shape(make_model)
  placed = sharding.param_shardings(model, gemma2.PARAM_AXES, mesh)
  assert len(jax.tree.leaves(placed)) == len(jax.tree.leaves(model))


@pytest.mark.parametrize(
  "kinds", [("full_attention",), ("chunked_attention",) * 3]
)
def test_layer_types_must_fit_the_layers(kinds):
  with pytest.raises(ValueError, match="each of the 3 layers"):
    make_model(layer_types=kinds)


def test_both_generations_of_config_files_are_read():
  old = CONFIG.to_dict() | {
    "model_type": "gemma2",
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rope_theta": 5000.0,
    "attention_bias": False,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
  }
  del old["layer_types"]
  new = old | {
    "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"},
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "use_bidirectional_attention": None,
  }
  del new["rope_theta"]
  read = gemma2_weights.gemma2_config(old)
  assert read == dataclasses.replace(CONFIG, rope_theta=5000.0)
  kinds = tuple(new["layer_types"])
  assert gemma2_weights.gemma2_config(new) == dataclasses.replace(
    read, layer_types=kinds
  )


@pytest.mark.parametrize(
  ("setting", "message"),
  [
    ({"hidden_activation": "relu"}, "hidden_activation must be"),
    ({"attention_bias": True}, "attention_bias must be False, got True"),
    ({"model_type": "gemma"}, "model_type must be 'gemma2', got 'gemma'"),
    (
      {"rope_parameters": {"rope_type": "yarn"}},
      "rope_type must be 'default', got 'yarn'",
    ),
  ],
)
def test_settings_that_are_not_computed_are_errors(setting, message):
  with pytest.raises(ValueError, match=message):
    gemma2_weights.gemma2_config(CONFIG.to_dict() | setting)


def test_a_causal_language_model_file_fills_the_model():
  model = make_model()
  rules = gemma2_weights.diffusers_rules(CONFIG)
  tensors = {f"model.{k}": v for k, v in mapping.save(model, rules).items()}
  tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
  assert tensors["model.layers.2.mlp.down_proj.weight"].shape == (16, 24)
  assert tensors["model.layers.0.self_attn.k_proj.weight"].shape == (12, 16)
  loaded = mapping.load(
    jax.eval_shape(make_model),
    rules,
    gemma2_weights.strip_prefix(tensors),
  )
  jax.tree.map(np.testing.assert_array_equal, loaded, model)
