import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax.nn import vision


def _random(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _silenced(module):
  """Zeroes the convolution, which leaves the shortcut."""
  return jax.tree.map(jnp.zeros_like, module)


def test_pixel_unshuffle_orders_channel_then_row_then_column(rng):
  x = _random(rng, 1, 4, 6, 3)
  y = np.asarray(vision.pixel_unshuffle(x))
  for c, dy, dx in np.ndindex(3, 2, 2):
    np.testing.assert_array_equal(
      y[..., 4 * c + 2 * dy + dx], x[:, dy::2, dx::2, c]
    )


def test_pixel_shuffle_undoes_pixel_unshuffle(rng):
  x = _random(rng, 2, 4, 6, 3)
  y = vision.pixel_shuffle(vision.pixel_unshuffle(x))
  np.testing.assert_array_equal(y, x)


def test_nearest_upsample_repeats_pixels(rng):
  x = _random(rng, 2, 3, 5, 2)
  expected = np.asarray(x).repeat(2, axis=1).repeat(2, axis=2)
  np.testing.assert_array_equal(vision.nearest_upsample(x), expected)


def _plain_upsampled_conv(x, kernel):
  return jax.lax.conv_general_dilated(
    vision.nearest_upsample(x),
    kernel,
    (1, 1),
    ((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


# One row or column is all border.
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)])
@pytest.mark.parametrize("implementation", [None, "corners", "dilated"])
def test_upsampled_conv_is_the_convolution_of_the_upsampled(
  rng, implementation, size
):
  x, kernel, weights = (
    rng.normal(size=shape)
    for shape in ((2, *size, 3), (3, 3, 3, 5), (2, 2 * size[0], 2 * size[1], 5))
  )

  def run(conv, x, kernel):
    y, pullback = jax.vjp(conv, x, kernel)
    _, tangent = jax.jvp(conv, (x, kernel), (x[::-1], kernel[::-1]))
    return y, tangent, *pullback(jnp.asarray(weights, y.dtype))

  def ours(x, kernel):
    return vision.upsampled_conv(x, kernel, implementation=implementation)

  with jax.enable_x64(True):
    expected = run(_plain_upsampled_conv, jnp.asarray(x), jnp.asarray(kernel))
    exact = run(ours, jnp.asarray(x), jnp.asarray(kernel))
  single = run(ours, *(jnp.asarray(a, jnp.float32) for a in (x, kernel)))
  for want, double, value in zip(expected, exact, single, strict=True):
    np.testing.assert_allclose(double, want, rtol=1e-12, atol=1e-12)
    # float32 sums of up to 54 terms of magnitude 1.
    np.testing.assert_allclose(value, want, rtol=1e-5, atol=2e-5)


def test_upsampled_conv_sums_coarse_taps_before_it_rounds_them(rng):
  x = _random(rng, 1, 6, 5, 8).astype(jnp.bfloat16)
  kernel = _random(rng, 3, 3, 8, 4)
  expected = _plain_upsampled_conv(x.astype(jnp.float32), kernel)
  y = vision.upsampled_conv(x, kernel)
  assert y.dtype == jnp.bfloat16
  # Two roundings of 2^-9 each, of the kernel and of the result.
  error = jnp.abs(y.astype(jnp.float32) - expected).max()
  assert error < 2**-7 * jnp.abs(expected).max()


def test_upsampling_multiplies_less_than_half_as_often():
  x = jax.ShapeDtypeStruct((1, 32, 32, 8), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 8, 8), jnp.float32)

  def flops(function):
    return jax.jit(function).lower(x, kernel).compile().cost_analysis()["flops"]

  ratio = flops(vision.upsampled_conv) / flops(_plain_upsampled_conv)
  # 4/9, the outermost corners, and the sums of taps.
  assert ratio < 0.5


def test_upsampled_conv_refuses_an_unknown_implementation(rng):
  x, kernel = _random(rng, 1, 2, 2, 3), _random(rng, 3, 3, 3, 4)
  with pytest.raises(ValueError, match="'corners', 'dilated' or None.*'four'"):
    vision.upsampled_conv(x, kernel, implementation="four")


def test_interpolation_applies_its_convolution_to_the_upsampled(rng):
  x = _random(rng, 1, 3, 4, 6)
  up = vision.Upsample(
    6, 4, method="interpolate", shortcut=False, rngs=nnx.Rngs(0)
  )
  expected = up.conv(vision.nearest_upsample(x))
  # float32 sums of 54 terms, in another order.
  np.testing.assert_allclose(up(x), expected, rtol=1e-5, atol=1e-5)


def test_shortcut_down_to_equal_width_is_the_average_of_each_cell(rng):
  x = _random(rng, 1, 4, 6, 3)
  down = _silenced(vision.Downsample(3, 3, method="conv", rngs=nnx.Rngs(0)))
  expected = x.reshape(1, 2, 2, 3, 2, 3).mean(axis=(2, 4))
  np.testing.assert_allclose(down(x), expected, rtol=1e-5, atol=1e-6)


def test_shortcut_down_to_twice_the_width_keeps_the_rows_apart(rng):
  x = _random(rng, 1, 4, 6, 2)
  down = _silenced(
    vision.Downsample(2, 4, method="pixel_unshuffle", rngs=nnx.Rngs(0))
  )
  y = np.asarray(down(x))
  for o in range(4):
    row = x[:, o % 2 :: 2, :, o // 2]
    expected = (row[..., 0::2] + row[..., 1::2]) / 2
    np.testing.assert_allclose(y[..., o], expected, rtol=1e-5, atol=1e-6)


def test_shortcut_up_to_equal_width_is_nearest_upsampling(rng):
  x = _random(rng, 1, 2, 3, 4)
  up = _silenced(vision.Upsample(4, 4, method="interpolate", rngs=nnx.Rngs(0)))
  np.testing.assert_array_equal(up(x), vision.nearest_upsample(x))


def test_shortcut_up_to_half_the_width_puts_channel_pairs_on_two_rows(rng):
  x = _random(rng, 1, 2, 3, 4)
  up = _silenced(
    vision.Upsample(4, 2, method="pixel_shuffle", rngs=nnx.Rngs(0))
  )
  y = np.asarray(up(x))
  for o, dy, dx in np.ndindex(2, 2, 2):
    np.testing.assert_array_equal(y[:, dy::2, dx::2, o], x[..., 2 * o + dy])


def test_both_ways_down_apply_their_convolution(rng):
  x = _random(rng, 1, 4, 6, 3)
  strided, unshuffled = (
    vision.Downsample(3, 4, method=method, shortcut=False, rngs=nnx.Rngs(0))
    for method in vision.DOWNSAMPLE_METHODS
  )
  full = jax.lax.conv_general_dilated(
    x,
    strided.conv.kernel[...],
    (1, 1),
    ((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  ) + strided.conv.bias[...].reshape(1, 1, 1, -1)
  # float32 sums of 27 terms, in another order.
  np.testing.assert_allclose(
    strided(x), full[:, ::2, ::2], rtol=1e-5, atol=1e-5
  )
  expected = vision.pixel_unshuffle(unshuffled.conv(x))
  np.testing.assert_array_equal(unshuffled(x), expected)


def test_batch_norm_uses_its_stored_statistics_and_does_not_train_them(rng):
  norm = vision.BatchNorm(3, eps=1e-5)
  norm = jax.tree.map(
    lambda leaf: jnp.asarray(rng.uniform(0.5, 2, leaf.shape), leaf.dtype), norm
  )
  x = _random(rng, 2, 4, 4, 3)
  mean, var, scale, bias = (
    np.asarray(leaf[...])
    for leaf in (norm.mean, norm.var, norm.scale, norm.bias)
  )
  expected = (np.asarray(x) - mean) / np.sqrt(var + 1e-5) * scale + bias
  np.testing.assert_allclose(norm(x), expected, rtol=1e-5, atol=1e-5)
  gradient = jax.grad(lambda norm: jnp.square(norm(x)).sum())(norm)
  assert not np.any(gradient.mean[...])
  assert not np.any(gradient.var[...])
  assert np.all(gradient.scale[...] != 0)


@pytest.mark.parametrize(
  ("widths", "options", "message"),
  [
    ((4, 4), {"method": "pool"}, "downsample method must be one of .*'pool'"),
    ((4, 6), {"method": "pixel_unshuffle"}, "in fours: got 6"),
    ((4, 6), {"method": "conv"}, "6 output channels do not divide"),
  ],
)
def test_downsample_refuses_what_it_cannot_do(widths, options, message):
  with pytest.raises(ValueError, match=message):
    vision.Downsample(*widths, **options, rngs=nnx.Rngs(0))


def test_upsample_refuses_what_it_cannot_do():
  with pytest.raises(ValueError, match="upsample method must be one of"):
    vision.Upsample(4, 4, method="bilinear", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="no multiple"):
    vision.Upsample(6, 4, method="interpolate", rngs=nnx.Rngs(0))
