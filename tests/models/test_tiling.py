import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.models import dc_ae, tiling


@pytest.fixture(scope="module")
def model():
  """A DC-AE f4 of one convolution per step, random everywhere."""
  config = config_lib.DCAEConfig(
    latent_channels=2,
    encoder_block_types="ResBlock",
    decoder_block_types="ResBlock",
    encoder_block_out_channels=(4, 4, 4),
    decoder_block_out_channels=(4, 4, 4),
    encoder_layers_per_block=(1, 1, 1),
    decoder_layers_per_block=(1, 1, 1),
    encoder_qkv_multiscales=((), (), ()),
    decoder_qkv_multiscales=((), (), ()),
  )
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), leaf.dtype),
    jax.eval_shape(lambda: dc_ae.DCAE.from_config(config, rngs=nnx.Rngs(0))),
  )


TILES = tiling.Tiling(
  tile_height=16, tile_width=24, stride_height=12, stride_width=16
)


def _reference(function, x, tile, stride, overlap, keep, multiple):
  """Tiles are changed in place, one after the other, then cropped."""
  function = jax.jit(function)
  grid = []
  for i in range(0, x.shape[1], stride[0]):
    grid.append([])
    for j in range(0, x.shape[2], stride[1]):
      piece = x[:, i : i + tile[0], j : j + tile[1]]
      h, w = (-(-side // multiple) * multiple for side in piece.shape[1:3])
      padded = np.zeros((x.shape[0], h, w, x.shape[3]), np.float32)
      padded[:, : piece.shape[1], : piece.shape[2]] = piece
      grid[-1].append(np.array(function(padded)))
  for i, row in enumerate(grid):
    for j, b in enumerate(row):
      if i:
        a = grid[i - 1][j]
        extent = min(a.shape[1], b.shape[1], overlap[0])
        for k in range(extent):
          b[:, k] = a[:, k - extent] * (1 - k / extent) + b[:, k] * k / extent
      if j:
        a = row[j - 1]
        extent = min(a.shape[2], b.shape[2], overlap[1])
        for k in range(extent):
          mixed = a[:, :, k - extent] * (1 - k / extent)
          b[:, :, k] = mixed + b[:, :, k] * k / extent
  rows = [
    np.concatenate([t[:, : keep[0], : keep[1]] for t in row], axis=2)
    for row in grid
  ]
  return np.concatenate(rows, axis=1)


def _jit(function, tiles=TILES):
  return jax.jit(lambda model, x: function(model, x, tiles))


# Last tiles of one latent row; and of one column after a tile that the border
# cuts as well.
@pytest.mark.parametrize("size", [(7, 10), (4, 9)])
def test_decode_blends_with_neighbours_that_are_blended_already(
  rng, model, size
):
  latents = jnp.asarray(rng.normal(size=(2, *size, 2)), jnp.float32)
  expected = _reference(
    model.decode, latents, (4, 6), (3, 4), (4, 8), (12, 16), multiple=1
  )
  # float32.
  np.testing.assert_allclose(
    _jit(tiling.decode)(model, latents), expected, rtol=1e-4, atol=1e-4
  )
  assert expected.shape == (2, 4 * size[0], 4 * size[1], 3)


def test_encode_pads_ragged_tiles_and_crops_the_latents(rng, model):
  images = jnp.asarray(rng.uniform(-1, 1, size=(1, 30, 46, 3)), jnp.float32)
  expected = _reference(
    model.encode, images, (16, 24), (12, 16), (1, 2), (3, 4), multiple=4
  )
  latents = _jit(tiling.encode)(model, images)
  assert latents.shape == (1, 7, 11, 2)
  # float32.
  np.testing.assert_allclose(
    latents, expected[:, :7, :11], rtol=1e-4, atol=1e-4
  )


def test_what_fits_in_one_tile_is_not_tiled(rng, model):
  images = jnp.asarray(rng.uniform(-1, 1, size=(1, 16, 24, 3)), jnp.float32)
  latents = _jit(tiling.encode)(model, images)
  np.testing.assert_array_equal(latents, jax.jit(model.encode)(images))
  decoded = _jit(tiling.decode)(model, latents)
  np.testing.assert_array_equal(decoded, jax.jit(model.decode)(latents))


def test_tiles_without_overlap_stand_side_by_side(rng, model):
  latents = jnp.asarray(rng.normal(size=(1, 4, 4, 2)), jnp.float32)
  tiles = tiling.Tiling(
    tile_height=16, tile_width=8, stride_height=16, stride_width=8
  )
  decode = jax.jit(model.decode)
  expected = np.concatenate(
    [decode(latents[:, :, :2]), decode(latents[:, :, 2:])], axis=2
  )
  # float32.
  np.testing.assert_allclose(
    _jit(tiling.decode, tiles)(model, latents), expected, rtol=1e-5, atol=1e-5
  )


def test_many_tiles_compile_few_decoders(model):
  sizes = {"tile_height": 16, "tile_width": 16} | {
    "stride_height": 12,
    "stride_width": 12,
  }
  tiles = tiling.Tiling(**sizes)
  latents = jax.ShapeDtypeStruct((1, 40, 40, 2), np.float32)
  jaxpr = jax.make_jaxpr(lambda z: tiling.decode(model, z, tiles))(latents)
  loops = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
  # 196 tiles; a side is whole or, in the last tile, one latent.
  assert len(loops) == 4


def test_tiling_refuses_gaps_between_tiles():
  with pytest.raises(ValueError, match="stride 16 for tiles of 8 pixels"):
    tiling.Tiling(tile_height=8, stride_height=16)


def test_tiling_refuses_sizes_the_autoencoder_does_not_divide(rng, model):
  tiles = tiling.Tiling(
    tile_height=18, tile_width=16, stride_height=16, stride_width=16
  )
  latents = jnp.asarray(rng.normal(size=(1, 8, 8, 2)), jnp.float32)
  with pytest.raises(ValueError, match="must be multiples of 4"):
    tiling.decode(model, latents, tiles)
