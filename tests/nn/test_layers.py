import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import sharding
from sana_jax.nn import layers
from sana_jax.nn import low_rank as low_rank_lib


def test_linear_multiplies_the_last_axis_and_adds_the_bias(rng):
  layer = layers.Linear(
    5, 3, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0)
  )
  x = rng.normal(size=(2, 4, 5)).astype(np.float32)
  expected = x @ np.asarray(layer.kernel[...]) + np.asarray(layer.bias[...])
  np.testing.assert_allclose(
    layer(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-5
  )


def test_linear_without_bias_has_one_parameter():
  layer = layers.Linear(5, 3, use_bias=False, rngs=nnx.Rngs(0))
  assert len(jax.tree.leaves(layer)) == 1


def test_layers_compute_in_dtype_and_keep_parameters_in_param_dtype(rng):
  x = jnp.asarray(rng.normal(size=(1, 4, 4, 3)), jnp.float32)
  for make in (layers.Linear, layers.Conv):
    layer = make(3, 2, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    assert layer(jnp.asarray(x)).dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(layer)} == {jnp.dtype("f4")}


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_conv_pads_both_sides_even_when_strided(rng, size, stride):
  layer = layers.Conv(2, 3, kernel_size=size, stride=stride, rngs=nnx.Rngs(0))
  x = rng.normal(size=(1, 4, 6, 2)).astype(np.float32)
  kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
  pad = size // 2
  padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
  expected = np.zeros((1, -(-4 // stride), -(-6 // stride), 3)) + bias
  for y, z in np.ndindex(expected.shape[1:3]):
    window = padded[
      0, y * stride : y * stride + size, z * stride : z * stride + size
    ]
    expected[0, y, z] += np.einsum("ijc,ijco->o", window, kernel)
  np.testing.assert_allclose(
    layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5
  )


def test_layer_norm_centres_and_scales(rng):
  x = rng.normal(3, 2, size=(2, 16)).astype(np.float32)
  expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(
    x.var(-1, keepdims=True) + 0.5
  )
  norm = layers.LayerNorm(16, eps=0.5)
  np.testing.assert_allclose(
    norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5
  )
  affine = layers.LayerNorm(16, eps=0.5, affine=True)
  affine.scale[...], affine.bias[...] = rng.normal(size=(2, 16))
  np.testing.assert_allclose(
    affine(jnp.asarray(x)),
    expected * np.asarray(affine.scale[...]) + np.asarray(affine.bias[...]),
    rtol=1e-4,
    atol=1e-5,
  )


def test_rms_norm_divides_by_the_root_mean_square(rng):
  x = rng.normal(3, 2, size=(2, 16)).astype(np.float32)
  norm = layers.RMSNorm(16, eps=0.5, use_bias=True)
  norm.scale[...], norm.bias[...] = rng.normal(size=(2, 16))
  expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 0.5)
  expected = expected * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])
  np.testing.assert_allclose(
    norm(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-5
  )


def test_a_zero_centred_rms_norm_stores_the_scale_minus_one(rng):
  x = rng.normal(size=(2, 16)).astype(np.float32)
  plain = layers.RMSNorm(16, eps=1e-6, scale_init=1.5)
  centred = layers.RMSNorm(16, eps=1e-6, scale_init=1.5, zero_centered=True)
  np.testing.assert_array_equal(centred.scale[...], 0.5)
  np.testing.assert_allclose(
    centred(jnp.asarray(x)), plain(jnp.asarray(x)), rtol=1e-6
  )


def test_norms_of_bfloat16_keep_their_statistics_in_float32(rng):
  # 100 +- 1: bfloat16 statistics would lose the deviations entirely.
  x = jnp.asarray(100 + rng.integers(-1, 2, size=(1, 512)), jnp.bfloat16)
  y = layers.LayerNorm(512)(x)
  assert y.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    y.astype(jnp.float32),
    layers.LayerNorm(512)(x.astype(jnp.float32)),
    atol=0.01,  # one rounding to bfloat16 of values below 2
  )
  # The mean square of 512 equal values, to one rounding.
  ones = layers.RMSNorm(512, eps=0.0)(jnp.full((1, 512), 3, jnp.bfloat16))
  np.testing.assert_array_equal(ones, 1)


def test_the_default_convolution_init_is_bounded_by_the_fan_in():
  init = layers.torch_default_init(9)(jax.random.key(0), (3000,))
  assert np.abs(init).max() <= 1 / 3
  np.testing.assert_allclose(init.std(), 1 / 3 / np.sqrt(3), rtol=0.05)


def test_the_sinusoid_is_cosines_then_sines_as_published():
  table = layers.sinusoidal_embedding(jnp.array([999, 0.45]), 256)
  assert table.shape == (2, 256)
  expected = [
    [0.999650, 0.963785, -0.399021, 0.704842],
    [-0.026461, -0.266679, -0.916942, 0.709365],
  ]
  # float32 angles up to 999.
  np.testing.assert_allclose(table[0, :4], expected[0], atol=2e-4)
  np.testing.assert_allclose(table[0, 128:132], expected[1], atol=2e-4)
  np.testing.assert_allclose(
    table[1, [0, 3, 128, 131]], [0.900447, 0.934967, 0.434966, 0.354733],
    atol=2e-6,
  )  # fmt: skip


@pytest.mark.parametrize("low_rank", [False, True])
def test_parts_of_an_output_are_the_same_on_every_mesh(rng, low_rank):
  layer = layers.Linear(
    8, 12, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0)
  )
  if low_rank:
    down, up = rng.normal(size=(8, 2)), rng.normal(size=(2, 12))
    layer = low_rank_lib.LowRankLinear(
      layer, jnp.asarray(down, jnp.float32), jnp.asarray(up, jnp.float32)
    )
  x = rng.normal(size=(4, 5, 8)).astype(np.float32)
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})

  @jax.jit
  def parts(layer, x):
    with sharding.use(mesh):
      return layer.split(x, 3, axis="mlp")

  found = parts(layer, jax.device_put(x, sharding.replicated(mesh)))
  expected = np.split(layer(x), 3, axis=-1)
  assert len(found) == 3
  for one, other, alone in zip(
    found, expected, layer.split(x, 3, axis="mlp"), strict=True
  ):
    np.testing.assert_array_equal(alone, other)
    # The order of sums of eight products.
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
