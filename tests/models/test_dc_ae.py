import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax import sharding, tree
from sana_jax.models import dc_ae


def _config(**options) -> config_lib.DCAEConfig:
  values = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (4, 8, 8),
    "decoder_block_out_channels": (4, 8, 8),
    "encoder_layers_per_block": (1, 1, 1),
    "decoder_layers_per_block": (1, 2, 1),
    "encoder_qkv_multiscales": ((), (), (3,)),
    "decoder_qkv_multiscales": ((), (), (3, 5)),
  }
  return config_lib.DCAEConfig(**values | options)


CONFIGS = {
  "sana": _config(),
  "in": _config(
    encoder_layers_per_block=(0, 1, 1),
    decoder_layers_per_block=(0, 1, 1),
    encoder_qkv_multiscales=((), (), ()),
    decoder_norm_types=("batch_norm", "batch_norm", "rms_norm"),
    decoder_act_fns=("relu", "relu", "silu"),
    downsample_block_type="pixel_unshuffle",
    upsample_block_type="pixel_shuffle",
  ),
  "lite": _config(
    decoder_block_types="ResBlock",
    decoder_layers_per_block=(0, 1, 1),
    decoder_qkv_multiscales=((), (), ()),
    upsample_block_type="pixel_shuffle",
    decoder_conv_act_fn="silu",
  ),
  "strided": _config(
    encoder_block_types="EfficientViTBlock",
    encoder_layers_per_block=(0, 1, 1),
    decoder_layers_per_block=(0, 1, 1),
    decoder_norm_types="batch_norm",
    encoder_out_shortcut=False,
    decoder_in_shortcut=False,
  ),
}


def _build(config, **options):
  return dc_ae.DCAE.from_config(config, rngs=nnx.Rngs(0), **options)


def _random_model(config, rng, **options):
  """Every parameter differs from zero, so that none goes unnoticed."""

  def draw(name, leaf):
    values = 0.5 * rng.normal(size=leaf.shape)
    values = np.abs(values) + 0.5 if name.endswith("var") else values
    return jnp.asarray(values, leaf.dtype)

  build = functools.partial(_build, config, **options)
  return tree.map_with_names(draw, jax.eval_shape(build))


def _images(rng, *shape):
  return jnp.asarray(rng.uniform(-1, 1, size=(*shape, 3)), jnp.float32)


def _named(model):
  return dict(zip(tree.leaf_names(model), jax.tree.leaves(model), strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_but_the_batch_statistics_gets_a_gradient(rng, name):
  config = CONFIGS[name]
  model = _random_model(config, rng)
  images = _images(rng, 2, 8, 12)

  @jax.jit
  def loss_and_latents(model):
    latents = model.encode(images)
    return jnp.square(model.decode(latents) - images).mean(), latents

  gradients, latents = jax.grad(loss_and_latents, has_aux=True)(model)
  assert latents.shape == (2, 2, 3, 4)
  constants = {n for n, g in _named(gradients).items() if not np.any(g)}
  expected = {n for n in _named(model) if n.split("/")[-1] in ("mean", "var")}
  assert constants == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_decode_returns_images_of_the_encoded_size(name):
  model = jax.eval_shape(lambda: _build(CONFIGS[name]))
  latents = jax.ShapeDtypeStruct((2, 2, 3, 4), jnp.float32)
  decoded = jax.eval_shape(lambda model, z: model.decode(z), model, latents)
  assert decoded.shape == (2, 8, 12, 3)


@pytest.mark.parametrize("name", CONFIGS)
def test_param_axes_place_every_parameter(name):
  model = jax.eval_shape(lambda: _build(CONFIGS[name]))
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  placed = sharding.param_shardings(model, dc_ae.PARAM_AXES, mesh)
  specs = {path: leaf.spec for path, leaf in _named(placed).items()}
  # Four input channels could be cut into four too: only outputs are.
  assert specs["encoder/conv_out/kernel"] == jax.P(None, None, None, "fsdp")
  assert (
    specs[
      "decoder/conv_out/bias" if name == "sana" else "decoder/norm_out/bias"
    ]
    == jax.P()
  )


@pytest.mark.parametrize(
  ("config", "parameters"),
  [
    (config_lib.DCAEConfig(), 312_250_275),
    (config_lib.dc_ae_lite(), 421_181_228),
  ],
)
def test_full_models_have_the_published_number_of_parameters(
  config, parameters
):
  model = jax.eval_shape(lambda: _build(config))
  assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters


def test_encoder_shortcut_averages_consecutive_channels(rng):
  config = CONFIGS["sana"]
  without = dataclasses.replace(config, encoder_out_shortcut=False)
  model = _random_model(config, rng)
  plain = jax.tree.unflatten(
    jax.tree.structure(jax.eval_shape(lambda: _build(without))),
    jax.tree.leaves(model),
  )
  images = _images(rng, 1, 8, 8)
  encode = jax.jit(lambda model: model.encode(images))
  difference = np.asarray(encode(model)) - encode(plain)
  # Without an output convolution, what is left is the shortcut.
  for leaf in (model.encoder.conv_out.kernel, model.encoder.conv_out.bias):
    leaf[...] = jnp.zeros_like(leaf[...])
  # float32 differences of numbers of size ten.
  np.testing.assert_allclose(difference, encode(model), rtol=1e-3, atol=1e-3)


def test_decoder_shortcut_repeats_each_latent_channel(rng):
  model = _random_model(CONFIGS["sana"], rng)
  for leaf in (model.decoder.conv_in.kernel, model.decoder.conv_in.bias):
    leaf[...] = jnp.zeros_like(leaf[...])
  seen = []
  model.decoder.stages = nnx.List([])
  model.decoder.norm_out = lambda x: seen.append(x) or x
  model.decoder.conv_out = lambda x: x
  latents = jnp.asarray(rng.normal(size=(1, 2, 3, 4)), jnp.float32)
  model.decode(latents)
  np.testing.assert_array_equal(seen[0], np.asarray(latents).repeat(2, axis=-1))


def test_remat_changes_no_gradient(rng):
  images = _images(rng, 1, 8, 8)

  def gradients(model):
    return jax.jit(
      jax.grad(lambda m: jnp.abs(m.decode(m.encode(images))).sum())
    )(model)

  kept = _random_model(CONFIGS["sana"], np.random.default_rng(1))
  recomputed = _random_model(
    CONFIGS["sana"], np.random.default_rng(1), remat="full"
  )
  # float32: fusions differ.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=1e-3, atol=1e-3 * np.abs(b).max()
    ),
    jax.tree.leaves(gradients(kept)),
    jax.tree.leaves(gradients(recomputed)),
  )


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters(rng):
  images = _images(rng, 1, 8, 8)
  exact, rounded = (
    _random_model(CONFIGS["sana"], np.random.default_rng(1), dtype=dtype)
    for dtype in (jnp.float32, jnp.bfloat16)
  )
  latents = jax.jit(rounded.encode)(images)
  assert latents.dtype == jax.eval_shape(rounded.decode, latents).dtype
  assert latents.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in jax.tree.leaves(rounded)} == {
    jnp.dtype("float32")
  }
  reference = np.asarray(jax.jit(exact.encode)(images))
  error = np.asarray(latents, np.float32) - reference
  # Eight mantissa bits through about twenty layers.
  assert np.linalg.norm(error) < 0.05 * np.linalg.norm(reference)


def test_encode_refuses_sides_that_do_not_divide(rng):
  model = jax.eval_shape(lambda: _build(CONFIGS["sana"]))
  with pytest.raises(ValueError, match="images of 8x10.*multiples of 4"):
    model.encode(_images(rng, 1, 8, 10))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"decoder_act_fns": ("relu",)}, "decoder_act_fns has 1 entries for 3"),
    ({"decoder_act_fns": "tanh"}, "activation must be one of .*'tanh'"),
    ({"decoder_norm_types": "layer_norm"}, "norm type must be one of"),
    ({"encoder_block_types": "MBConv"}, "block type must be one of"),
    ({"decoder_conv_act_fn": "tanh"}, "decoder_conv_act_fn must be one of"),
    ({"latent_channels": 3}, "encoder_out_shortcut: .* 8 channels"),
    (
      {"latent_channels": 3, "encoder_out_shortcut": False},
      "decoder_in_shortcut: .*multiple of latent_channels",
    ),
  ],
)
def test_from_config_refuses_options_that_do_not_fit(options, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda: _build(_config(**options)))
