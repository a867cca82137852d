"""Decoding: the same images on any number of devices, in any order."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax.models import dc_ae, tiling, windows
from sana_jax.pipeline import decoding, execution, stages
from tests import tiny

# float32: XLA may fuse tiles of a batch differently.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
TILES = tiling.Tiling(
  tile_height=16, tile_width=24, stride_height=12, stride_width=16
)


@pytest.fixture(scope="module")
def autoencoder():
  config = dataclasses.replace(
    tiny.autoencoder_config(),
    decoder_block_types="ResBlock",
    decoder_qkv_multiscales=((), (), ()),
  )
  return tiny.random_model(
    lambda: dc_ae.DCAE.from_config(config, rngs=nnx.Rngs(0)), 2
  )


def decode(autoencoder, latents, how, *, devices=1, size=None, progress=None):
  height, width = size or (4 * latents.shape[1], 4 * latents.shape[2])
  return decoding.decode(
    execution.Executor(jax.devices()[:devices]),
    autoencoder,
    latents,
    how=how,
    scaling_factor=0.4,
    height=height,
    width=width,
    progress=progress,
  )


# Up to 4 shapes of tiles, some of them once: nothing divides.
@pytest.mark.parametrize(
  ("size", "batch", "devices"),
  [((8, 11), 1, 1), ((8, 11), 1, 8), ((13, 7), 3, 3)],
)
def test_tiles_over_devices_are_those_of_one_program(
  rng, autoencoder, size, batch, devices
):
  latents = jnp.asarray(rng.normal(size=(batch, *size, 4)), jnp.float32)
  expected = jax.jit(
    lambda model, z: stages.to_unit(tiling.decode(model, z / 0.4, TILES))
  )(autoencoder, latents)
  images = decode(
    autoencoder, latents, decoding.Decoding(TILES), devices=devices
  )
  np.testing.assert_allclose(images, expected, **TOLERANCE)
  assert expected.std() > 0.05


def test_images_one_at_a_time_are_those_of_a_batch(rng, autoencoder):
  latents = jnp.asarray(rng.normal(size=(5, 6, 6, 4)), jnp.float32)
  expected = decode(autoencoder, latents, decoding.Decoding())
  how = decoding.Decoding(one_at_a_time=True)
  images = decode(autoencoder, latents, how, devices=2)
  np.testing.assert_allclose(images, expected, **TOLERANCE)


def test_images_in_windows_are_whole_images(rng, autoencoder):
  latents = jnp.asarray(rng.normal(size=(3, 13, 9, 4)), jnp.float32)
  expected = decode(autoencoder, latents, decoding.Decoding(), size=(50, 36))
  how = decoding.Decoding(windows=windows.Windows(window_side=16))
  images = decode(autoencoder, latents, how, devices=2, size=(50, 36))
  np.testing.assert_allclose(images, expected, **TOLERANCE)
  assert expected.std() > 0.05


def test_one_at_a_time_takes_the_memory_of_one(autoencoder):
  def temporaries(batch, one_at_a_time):
    def run(model, latents):
      return decoding.decode_whole(
        autoencoder=model,
        latents=latents,
        scaling_factor=1.0,
        one_at_a_time=one_at_a_time,
        height=64,
        width=64,
      )

    latents = jax.ShapeDtypeStruct((batch, 16, 16, 4), jnp.float32)
    compiled = jax.jit(run).lower(autoencoder, latents).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporaries(8, False) > 4 * temporaries(1, False)
  # One image more: the one that is copied into the result.
  assert temporaries(8, True) < 2 * temporaries(1, False)


def test_tiled_images_are_fitted_to_their_size_like_whole_ones(
  rng, autoencoder
):
  latents = jnp.asarray(rng.normal(size=(1, 8, 8, 4)), jnp.float32)
  full = decode(autoencoder, latents, decoding.Decoding(TILES))
  cropped = decode(
    autoencoder, latents, decoding.Decoding(TILES), size=(32, 20)
  )
  np.testing.assert_allclose(cropped, full[:, :, 6:26], **TOLERANCE)


@pytest.mark.usefixtures("nothing_compiled")
def test_progress_tells_of_every_program_once(rng, autoencoder):
  latents = jnp.asarray(rng.normal(size=(1, 8, 8, 4)), jnp.float32)
  events = []
  decode(autoencoder, latents, decoding.Decoding(TILES), progress=events.append)
  done = [e.phase for e in events if e.seconds is not None]
  # Rows of 4 and 4, 2; columns of 6 and 4: two by two shapes, and blending.
  assert done.count("compile") == done.count("run") == 5
  assert {e.stage for e in events} == {"decoder"}
