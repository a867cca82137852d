import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax import sharding, tree
from sana_jax.models import sana


def _config(**changes):
  values = {
    "in_channels": 3,
    "out_channels": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 16,
    "caption_channels": 5,
    "sample_size": 4,
  }
  return config_lib.SanaConfig(**(values | changes))


EVERY_OPTION = {
  "patch_size": 2,
  "out_channels": 6,
  "attention_bias": True,
  "norm_elementwise_affine": True,
  "norm_eps": 1e-3,
  "qk_norm": "rms_norm_across_heads",
  "guidance_embeds": True,
  "interpolation_scale": 2.0,
}


def _abstract(options, **kwargs):
  return jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(
      _config(**(options or {})), rngs=nnx.Rngs(0), **kwargs
    )
  )


def _model(options=None, **kwargs):
  """A model whose parameters are all random, biases and norms included."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), leaf.dtype),
    _abstract(options, **kwargs),
  )


def _fresh(**options):
  """A model as training starts from."""
  return jax.jit(
    lambda: sana.SanaTransformer.from_config(
      _config(**options), rngs=nnx.Rngs(0)
    )
  )()


def _run(model, **inputs):
  return jax.jit(lambda inputs: model(**inputs))(inputs)


def _inputs(rng, guidance=False, batch=2):
  inputs = {
    "latents": rng.normal(size=(batch, 4, 6, 3)),
    "timestep": rng.uniform(0, 1000, size=batch),
    "text": rng.normal(size=(batch, 7, 5)),
  }
  if guidance:
    inputs["guidance"] = rng.uniform(0.2, 0.6, size=batch)
  inputs = {k: jnp.asarray(v, jnp.float32) for k, v in inputs.items()}
  return inputs | {"text_mask": jnp.arange(7)[None] < jnp.array([[4], [7]])}


@pytest.mark.parametrize(
  ("config", "count"),
  [
    (config_lib.sana_600m(), 591_747_872),
    (config_lib.sana_1600m(), 1_604_462_752),
    (config_lib.sana_1600m_2k(), 1_604_462_752),
    (config_lib.sana_1600m_4k(), 1_604_462_752),
    (config_lib.sana15_1600m(), 1_604_641_952),
    (config_lib.sana15_4800m(), 4_721_825_952),
    (config_lib.sana_sprint_600m(), 593_501_216),
    (config_lib.sana_sprint_1600m(), 1_610_237_472),
  ],
)
def test_presets_have_the_published_number_of_parameters(config, count):
  model = jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0))
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count


@pytest.mark.parametrize("options", [{}, EVERY_OPTION])
def test_scan_and_remat_change_neither_values_nor_gradients(rng, options):
  inputs = _inputs(rng, guidance="guidance_embeds" in options)

  def loss_and_grads(**kwargs):
    loss = lambda model: jnp.mean(model(**inputs) ** 2)  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(loss))(_model(options, **kwargs))
    return value, jax.tree.leaves(grads)

  value, grads = loss_and_grads(scan=False)
  for kwargs in ({"remat": "full"}, {"remat": "dots", "scan": False}):
    other_value, other_grads = loss_and_grads(**kwargs)
    np.testing.assert_allclose(other_value, value, rtol=1e-4)
    for a, b in zip(other_grads, grads, strict=True):
      # Another order of float32 operations.
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * np.abs(b).max())


def test_every_parameter_receives_a_gradient(rng):
  inputs = _inputs(rng, guidance=True)
  model = _model(EVERY_OPTION)
  grads = jax.jit(jax.grad(lambda m: jnp.mean(m(**inputs) ** 2)))(model)
  for name, grad in zip(
    tree.leaf_names(grads), jax.tree.leaves(grads), strict=True
  ):
    assert np.abs(grad).max() > 1e-7, name


def test_forward_and_reverse_derivatives_agree(rng):
  inputs = _inputs(rng, guidance=True)
  model = _model(EVERY_OPTION, remat="full")

  @jax.jit
  def products(latents, timestep, d_latents, d_timestep, cotangent):
    fn = lambda x, t: model(**(inputs | {"latents": x, "timestep": t}))  # noqa: E731
    primals, tangents = (latents, timestep), (d_latents, d_timestep)
    forward = jax.jvp(fn, primals, tangents)[1]
    by_latents, by_time = jax.vjp(fn, *primals)[1](cotangent)
    reverse = jnp.vdot(by_latents, d_latents) + jnp.vdot(by_time, d_timestep)
    return jnp.vdot(cotangent, forward), reverse

  forward, reverse = products(
    inputs["latents"],
    jnp.array([0.3, 0.8]),
    *(jnp.asarray(rng.normal(size=s), jnp.float32) for s in [(2, 4, 6, 3), 2]),
    jnp.asarray(rng.normal(size=(2, 4, 6, 6)), jnp.float32),
  )
  np.testing.assert_allclose(forward, reverse, rtol=1e-3)  # float32


def test_a_batch_is_its_samples_one_by_one(rng):
  model, inputs = _model(), _inputs(rng)
  run = jax.jit(lambda **inputs: model(**inputs))
  together = run(**inputs)
  for i in range(2):
    alone = run(**{name: value[i : i + 1] for name, value in inputs.items()})
    np.testing.assert_allclose(alone[0], together[i], rtol=1e-3, atol=1e-4)


def test_masked_tokens_change_nothing_and_an_absent_mask_keeps_all(rng):
  model, inputs = _model(), _inputs(rng)
  run = jax.jit(lambda **inputs: model(**inputs))
  out = run(**inputs)
  moved = jnp.where(inputs["text_mask"][..., None], inputs["text"], 9.0)
  np.testing.assert_array_equal(run(**(inputs | {"text": moved})), out)
  # The second sample keeps all its tokens.
  unmasked = run(**(inputs | {"text_mask": None}))
  np.testing.assert_allclose(unmasked[1], out[1], rtol=1e-4, atol=1e-5)
  assert np.abs(unmasked[0] - out[0]).max() > 1e-3


def test_integer_timesteps_are_the_same_as_whole_floats(rng):
  model, inputs = _model(), _inputs(rng)
  run = jax.jit(lambda t: model(**(inputs | {"timestep": t})))
  np.testing.assert_array_equal(
    run(jnp.array([603, 12])), run(jnp.array([603.0, 12.0]))
  )


def test_patches_and_output_channels_follow_the_config(rng):
  inputs = _inputs(rng, guidance=True)
  model = _model(EVERY_OPTION)
  out = jax.eval_shape(lambda: model(**inputs))
  assert out.shape == (2, 4, 6, 6)
  assert model.patch_embed.projection.kernel.shape == (2 * 2 * 3, 16)
  default = _abstract({"out_channels": None})
  assert default.head.projection.kernel.shape == (16, 3)


def test_guidance_does_nothing_at_first_and_can_be_learned(rng):
  inputs = _inputs(rng, guidance=True)
  fresh = _fresh(guidance_embeds=True)
  trained = _model({"guidance_embeds": True})
  for model, least, most in ((fresh, 0, 0), (trained, 1e-4, np.inf)):
    run = jax.jit(lambda g, m=model: m(**(inputs | {"guidance": g})))
    change = np.abs(run(inputs["guidance"]) - run(jnp.array([0.9, 0.1]))).max()
    assert least <= change <= most


def test_bfloat16_computes_close_to_float32_and_returns_float32(rng):
  inputs = _inputs(rng)
  exact = _run(_model(), **inputs)
  rounded = _run(_model(dtype=jnp.bfloat16), **inputs)
  assert rounded.dtype == jnp.float32
  error = jnp.linalg.norm(rounded - exact) / jnp.linalg.norm(exact)
  # Eight bits of mantissa through two blocks; and really bfloat16 inside.
  assert 1e-4 < error < 0.05


def test_bfloat16_keeps_the_residual_stream_in_float32(rng):
  model, inputs = _model(dtype=jnp.bfloat16), _inputs(rng)

  def parts(latents, timestep, text, text_mask):
    x = model.patch_embed(latents)
    embedded, modulation = model.embed_time(timestep)
    block = jax.tree.map(lambda leaf: leaf[0], model.blocks)
    out = block(x, modulation, model.caption_embed(text), text_mask)
    return x, embedded, modulation, out

  kinds = {y.dtype for y in jax.eval_shape(lambda: parts(**inputs))}
  assert kinds == {jnp.dtype("float32")}


def test_a_model_cast_to_bfloat16_runs(rng):
  model = jax.tree.map(
    lambda leaf: leaf.astype(jnp.bfloat16), _model(dtype=jnp.bfloat16)
  )
  assert np.isfinite(_run(model, **_inputs(rng))).all()


def test_initial_values_are_those_of_the_papers():
  model = _fresh(
    num_attention_heads=8, cross_attention_dim=64, cross_attention_head_dim=16
  )
  np.testing.assert_array_equal(
    model.caption_embed.norm.scale[...], np.float32(0.01)
  )
  # Standard deviations of at least 768 draws.
  tables = model.blocks.scale_shift_table[...]
  np.testing.assert_allclose(tables.std(), 1 / 8, rtol=0.1)
  kernel = model.time_modulation.kernel[...]
  np.testing.assert_allclose(kernel.std(), 0.02, rtol=0.1)
  qkv = model.blocks.self_attention.qkv.kernel[...]
  np.testing.assert_allclose(qkv.std(), np.sqrt(2 / (4 * 64)), rtol=0.1)
  assert np.abs(model.head.projection.kernel[...]).max() > 0.01


def test_every_parameter_has_a_sharding_row_and_depthwise_kernels_stay_whole():
  model = _abstract(EVERY_OPTION)
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  specs = sharding.param_shardings(model, sana.PARAM_AXES, mesh)
  placed = dict(
    zip(tree.leaf_names(model), jax.tree.leaves(specs), strict=True)
  )
  for name, leaf in placed.items():
    matches = [row for row, _ in sana.PARAM_AXES if re.search(row, name)]
    assert len(matches) == 1, (name, matches)
    if name.startswith("blocks/"):
      assert tuple(leaf.spec)[:1] in ((), (None,)), name
  assert placed["blocks/ffn/depth_kernel"].is_fully_replicated
  assert not placed["blocks/ffn/point/kernel"].is_fully_replicated


@pytest.mark.parametrize(
  ("name", "shape", "message"),
  [
    ("latents", (2, 4, 6), r"latents must have shape \(batch, .*, 3\)"),
    ("latents", (2, 4, 6, 4), r"got \(2, 4, 6, 4\)"),
    ("timestep", (2, 1), r"timestep must have shape \(2\)"),
    ("text", (1, 7, 5), r"text must have shape \(2, tokens, 5\)"),
    ("text", (2, 7, 6), r"got \(2, 7, 6\)"),
    ("text_mask", (2, 7), "text_mask must be bool"),
    ("text_mask", (2, 6), r"text_mask must have shape \(2, 7\)"),
    ("guidance", (2,), "does not take guidance"),
  ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_misfit_input_is_named(rng, name, shape, message):
  inputs = _inputs(rng) | {name: jnp.ones(shape)}
  with pytest.raises(ValueError, match=message):
    _model()(**inputs)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_an_encoded_text_gives_what_the_text_gives(rng, scan, masked):
  model = _model(EVERY_OPTION, scan=scan)
  inputs = _inputs(rng, guidance=True)
  if not masked:
    inputs.pop("text_mask")
  plain = _run(model, **inputs)
  encoded = jax.jit(model.encode_text)(inputs["text"])
  # float32; two programs add in different orders.
  np.testing.assert_allclose(
    _run(model, **inputs | {"text": encoded}), plain, rtol=1e-4, atol=1e-4
  )
  other = jax.tree.map(lambda leaf: leaf[::-1], encoded)
  assert np.abs(_run(model, **inputs | {"text": other}) - plain).max() > 1e-3


@pytest.mark.usefixtures("unchecked")
def test_a_misfit_encoded_text_is_named(rng):
  inputs, model = _inputs(rng), _model()
  encoded = jax.eval_shape(model.encode_text, inputs["text"])
  wrong = jax.tree.map(lambda leaf: jnp.ones(leaf.shape[1:]), encoded)
  message = r"keys of the text must have shape \(2, 2, tokens, 4, 4\)"
  with pytest.raises(ValueError, match=message):
    model(**inputs | {"text": wrong})


@pytest.mark.usefixtures("unchecked")
def test_guidance_is_required_where_the_model_embeds_it(rng):
  model = _model({"guidance_embeds": True})
  with pytest.raises(ValueError, match="needs guidance"):
    model(**_inputs(rng))
  with pytest.raises(ValueError, match=r"guidance must have shape \(2\)"):
    model(**_inputs(rng), guidance=jnp.ones(()))


def test_latents_must_divide_into_patches(rng):
  model = _model({"patch_size": 2})
  inputs = _inputs(rng) | {"latents": jnp.ones((2, 4, 5, 3))}
  with pytest.raises(ValueError, match="4x5 do not divide into patches of 2x2"):
    model(**inputs)
