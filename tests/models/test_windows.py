"""Windows: what they decode is what the whole decoder decodes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sana_jax
from sana_jax import config as config_lib
from sana_jax.models import dc_ae, windows
from sana_jax.weights import components
from tests import tiny

RES, VIT = "ResBlock", "EfficientViTBlock"


def config_of(kinds, depths, upsample="interpolate", *, width=4):
  scales = tuple((3, 5) if kind == VIT else () for kind in kinds)
  return config_lib.DCAEConfig(
    latent_channels=4,
    attention_head_dim=4,
    encoder_block_types=kinds,
    decoder_block_types=kinds,
    encoder_block_out_channels=(width,) * len(kinds),
    decoder_block_out_channels=(width,) * len(kinds),
    encoder_layers_per_block=(1,) * len(kinds),
    decoder_layers_per_block=depths,
    encoder_qkv_multiscales=scales,
    decoder_qkv_multiscales=scales,
    upsample_block_type=upsample,
  )


CONFIGS = {
  "interpolate": config_of((RES, VIT, VIT), (1, 1, 1)),
  "empty": config_of((RES, RES, VIT), (0, 1, 1), "pixel_shuffle"),
  "no attention": config_of((RES,) * 5, (0, 1, 1, 1, 1), "pixel_shuffle"),
  "attention outside": config_of((VIT, RES), (1, 1)),
}


@functools.cache
def model_of(name: str, dtype=jnp.float32) -> dc_ae.DCAE:
  return tiny.random_model(
    lambda: dc_ae.DCAE.from_config(
      CONFIGS[name], dtype=dtype, rngs=nnx.Rngs(0)
    ),
    3,
  )


def in_windows(model, latents, side: int):
  cut = windows.Windows(window_side=side)
  return jax.jit(lambda m, z: windows.decode(m, z, cut))(model, latents)


# Nothing divides; of the last, one side of what is kept.
@pytest.mark.parametrize(
  ("name", "size", "latents_a_side"),
  [
    ("interpolate", (13, 9), 3),
    ("empty", (14, 7), 4),
    pytest.param("no attention", (7, 9), 2, marks=pytest.mark.slow),
    pytest.param("attention outside", (9, 12), 4, marks=pytest.mark.slow),
  ],
)
def test_windows_decode_what_the_whole_decodes(rng, name, size, latents_a_side):
  model = model_of(name)
  latents = jnp.asarray(rng.normal(size=(2, *size, 4)), jnp.float32)
  expected = jax.jit(model.decode)(latents)
  images = in_windows(
    model, latents, latents_a_side * model.spatial_compression
  )
  # float32: sums over all tokens are added up in another order.
  np.testing.assert_allclose(images, expected, rtol=1e-4, atol=3e-5)
  assert expected.std() > 0.1


def test_windows_as_large_as_the_image_are_no_windows():
  model = model_of("interpolate")
  latents = jax.ShapeDtypeStruct((1, 9, 6, 4), jnp.float32)

  def loops(side: int) -> int:
    cut = windows.Windows(window_side=side)
    program = jax.make_jaxpr(lambda z: windows.decode(model, z, cut))(latents)
    return sum(e.primitive.name == "scan" for e in program.eqns)

  assert loops(36) == 0
  # A step up, two of each block of attention, and the rest.
  assert loops(4) == 1 + 2 * 2 + 1


@pytest.mark.slow
def test_in_bfloat16_windows_are_as_near_to_float32_as_the_whole(rng):
  model = model_of("interpolate")
  narrow = model_of("interpolate", jnp.bfloat16)
  latents = jnp.asarray(rng.normal(size=(1, 13, 9, 4)), jnp.bfloat16)
  images = in_windows(narrow, latents, 8).astype(jnp.float32)
  whole = jax.jit(narrow.decode)(latents).astype(jnp.float32)
  exact = jax.jit(model.decode)(latents.astype(jnp.float32))
  error = np.abs(whole - exact).mean()
  assert np.abs(images - exact).mean() < 1.2 * error
  assert error < 0.1 * exact.std()


@pytest.mark.slow
def test_the_emoji_autoencoder_decodes_the_same_in_windows(rng):
  path = sana_jax.bundled_checkpoint() / "vae"
  model, _ = components.load_autoencoder(path, dtype=jnp.float32)
  latents = jnp.asarray(rng.normal(size=(1, 7, 5, 32)), jnp.float32)
  expected = jax.jit(model.decode)(latents)
  # float32, in a range of about 2.
  np.testing.assert_allclose(
    in_windows(model, latents, 32), expected, rtol=0, atol=1e-4
  )


@functools.cache
def published_structure(name: str) -> tuple[dc_ae.DCAE, windows.Outer]:
  """Levels and blocks as published, of few channels."""
  published = {"sana": config_lib.DCAEConfig(), "lite": config_lib.dc_ae_lite()}
  config = published[name]
  config.encoder_block_out_channels = (4,) * 6
  config.decoder_block_out_channels = (4,) * 6
  config.latent_channels = config.attention_head_dim = 4
  # A maximum may turn NaN into a number.
  config.decoder_conv_act_fn = "silu"
  model = tiny.random_model(
    lambda: dc_ae.DCAE.from_config(config, rngs=nnx.Rngs(0)), 1
  )
  decoder = model.decoder
  return model, windows.outer_levels(decoder.specs, decoder.upsample)


@pytest.mark.parametrize(
  ("name", "halo"),
  [("sana", 7), pytest.param("lite", 9, marks=pytest.mark.slow)],
)
def test_the_halo_is_what_pixels_depend_on(rng, name, halo):
  model, outer = published_structure(name)
  assert outer == (3, 8, halo)
  decoder = model.decoder
  finish = jax.jit(
    functools.partial(decoder.finish, stages=decoder.stages[: outer.count])
  )
  first, last = halo + 3, halo + 5

  def pixels(axis, before, behind):
    """Decodes with NaN but for what is kept and a halo of so many features."""
    shape = [1, 3, 3, 4]
    shape[axis] = last + halo + 4
    x = np.full(shape, np.nan, np.float32)
    kept = [slice(None)] * 4
    kept[axis] = slice(first - before, last + behind)
    x[tuple(kept)] = rng.normal(size=x[tuple(kept)].shape)
    y = np.moveaxis(np.asarray(finish(x)), axis, 0)
    return y[8 * first : 8 * last]

  for axis in (1, 2):
    assert np.isfinite(pixels(axis, halo, halo)).all()
    assert np.isnan(pixels(axis, halo - 1, halo)[0]).any()
    assert np.isnan(pixels(axis, halo, halo - 1)[-1]).any()


def test_windows_take_a_fraction_of_the_memory():
  model = jax.eval_shape(
    lambda: dc_ae.DCAE.from_config(
      config_of((RES, RES, VIT), (1, 1, 1), width=16), rngs=nnx.Rngs(0)
    )
  )
  latents = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)

  def temporaries(function):
    compiled = jax.jit(function).lower(model, latents).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  cut = windows.Windows(window_side=32)
  cuts = temporaries(lambda m, z: windows.decode(m, z, cut))
  assert cuts < temporaries(lambda m, z: m.decode(z)) / 4


def test_a_side_must_be_whole_latents(rng):
  latents = jnp.asarray(rng.normal(size=(1, 8, 8, 4)), jnp.float32)
  with pytest.raises(ValueError, match="side of 10 must be a multiple of 4"):
    in_windows(model_of("interpolate"), latents, 10)
  with pytest.raises(ValueError, match="must be positive, got 0"):
    windows.Windows(window_side=0)
