import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax.nn import embeddings

NORMAL = (nnx.initializers.normal(0.1),) * 2


def test_a_patch_vector_runs_over_rows_then_columns_then_channels(rng):
  x = rng.normal(size=(2, 4, 6, 3)).astype(np.float32)
  patches = embeddings.patchify(jnp.asarray(x), 2)
  assert patches.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(patches[1, 1, 2], x[1, 2:4, 4:6].reshape(-1))


def test_unpatchify_inverts_patchify(rng):
  x = jnp.asarray(rng.normal(size=(2, 4, 6, 3)), jnp.float32)
  back = embeddings.unpatchify(embeddings.patchify(x, 2), 2)
  np.testing.assert_array_equal(back, x)


def test_positions_are_width_first_and_sines_first():
  grid = embeddings.sincos_2d(2, 3, 16, base_size=4, interpolation_scale=2)
  assert grid.shape == (2, 3, 16)
  # The grid spans [0, 2) on both axes: x of the middle column is 2/3.
  x, y = 2 / 3, 1.0
  f = 10000.0 ** (-np.arange(4) / 4)
  expected = [np.sin(x * f), np.cos(x * f), np.sin(y * f), np.cos(y * f)]
  np.testing.assert_allclose(
    grid[1, 1], np.concatenate(expected), rtol=1e-6, atol=1e-7
  )


def test_published_positions():
  grid = embeddings.sincos_2d(2, 3, 16, base_size=4, interpolation_scale=2)
  by_column = [0.6184, 0.0666, 0.0067, 0.0007, 0.7859, 0.9978, 1, 1]
  by_row = [0.8415, 0.0998, 0.0100, 0.0010, 0.5403, 0.9950, 1, 1]
  # Four published decimals.
  np.testing.assert_allclose(grid[0, 1, :8], by_column, atol=6e-5)
  np.testing.assert_allclose(grid[1, 0, 8:], by_row, atol=6e-5)


def test_positions_span_the_same_range_on_every_grid():
  small = embeddings.sincos_2d(4, 4, 8, base_size=4, interpolation_scale=1)
  large = embeddings.sincos_2d(8, 12, 8, base_size=4, interpolation_scale=1)
  np.testing.assert_allclose(large[::2, ::3], small, rtol=1e-6, atol=1e-7)


def test_positions_need_a_width_divisible_by_four():
  with pytest.raises(ValueError, match="divisible by 4, got 10"):
    embeddings.sincos_2d(2, 2, 10, base_size=2, interpolation_scale=1)


def test_patch_embed_adds_positions_in_float32(rng):
  x = jnp.asarray(rng.normal(size=(1, 4, 4, 3)), jnp.float32)
  make = lambda scale: embeddings.PatchEmbed(  # noqa: E731
    3,
    8,
    patch_size=2,
    base_size=2,
    interpolation_scale=scale,
    dtype=jnp.bfloat16,
    rngs=nnx.Rngs(0),
  )
  with_positions, without = make(1.0)(x), make(None)(x)
  assert with_positions.dtype == jnp.float32
  grid = embeddings.sincos_2d(2, 2, 8, base_size=2, interpolation_scale=1)
  np.testing.assert_allclose(
    with_positions - without, grid[None], rtol=1e-5, atol=1e-6
  )


def test_time_embedding_tells_neighbouring_bfloat16_times_apart():
  # bfloat16 rounds 999 to 1000.
  embed = embeddings.TimeEmbed(16, kernel_inits=NORMAL, rngs=nnx.Rngs(0))
  out = embed(jnp.array([999, 1000]))
  assert out.dtype == jnp.float32
  assert np.abs(out[0] - out[1]).max() > 1e-2


def test_time_embedding_takes_integer_times():
  embed = embeddings.TimeEmbed(16, kernel_inits=NORMAL, rngs=nnx.Rngs(0))
  np.testing.assert_array_equal(
    embed(jnp.array([3, 603])), embed(jnp.array([3.0, 603.0]))
  )


def test_captions_start_small():
  embed = embeddings.CaptionEmbed(6, 8, rngs=nnx.Rngs(0))
  text = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 6)))
  out = embed(100 * text.astype(jnp.float32))
  # RMS-normalised, then scaled by 0.01.
  np.testing.assert_allclose(
    jnp.sqrt(jnp.mean(out**2, axis=-1)), 0.01, rtol=1e-2
  )
