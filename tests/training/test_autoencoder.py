"""The autoencoder recipe: its loss, written out, and the scaling factor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.data import emoji
from sana_jax.models import dc_ae
from sana_jax.training import autoencoder
from sana_jax.weights import components
from tests import tiny


@pytest.fixture(scope="module")
def config():
  made = config_lib.AutoencoderConfig(
    model=tiny.autoencoder_config(3), dtype="float32", remat="none"
  )
  made.data.split = "heldout"
  made.l2_weight = 0.7
  made.latent_noise = 0.3
  made.latent_penalty = 0.2
  return made


@pytest.fixture(scope="module")
def model(config):
  return tiny.random_model(
    lambda: dc_ae.DCAE.from_config(config.model, rngs=nnx.Rngs(0)), 0
  )


def test_the_loss_is_that_of_the_definition(config, model, rng):
  images = jnp.asarray(rng.uniform(-1, 1, (2, 8, 8, 3)), jnp.float32)
  key = jax.random.key(3)
  loss, scalars = autoencoder.reconstruction_loss(model, key, images, config)
  z = model.encode(images)
  noise = jax.random.normal(key, z.shape)
  error = np.asarray(model.decode(z + 0.3 * noise)) - images
  l1, l2 = np.abs(error).mean(), np.square(error).mean()
  expected = l1 + 0.7 * l2 + 0.2 * np.square(z).mean()
  # The sums are taken in different orders.
  np.testing.assert_allclose(loss, expected, rtol=1e-5)
  np.testing.assert_allclose(scalars["l1"], l1, rtol=1e-5)
  np.testing.assert_allclose(scalars["psnr"], -10 * np.log10(l2 / 4), rtol=1e-4)
  np.testing.assert_allclose(
    scalars["latent_rms"], np.sqrt(np.square(z).mean()), rtol=1e-5
  )


def test_scaled_latents_have_unit_variance(config, model):
  factor = autoencoder.scaling_factor(model, config.data, count=80)
  source = emoji.load("heldout")
  images = np.stack([source[i]["image"] for i in range(80)]) / 127.5 - 1
  latents = model.encode(jnp.asarray(images, jnp.float32))
  np.testing.assert_allclose(factor, 1 / latents.std(), rtol=1e-4)


def test_the_export_carries_the_measured_scaling_factor(
  config, model, tmp_path
):
  recipe = autoencoder.make_recipe(config)
  recipe.export({"autoencoder": model}, {}, epath.Path(tmp_path))
  again, found = components.load_autoencoder(tmp_path / "vae")
  assert found.scaling_factor == pytest.approx(
    autoencoder.scaling_factor(model, config.data)
  )
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(model), strict=True):
    np.testing.assert_array_equal(a, b)


def test_a_sample_shows_originals_above_reconstructions(config, model):
  recipe = autoencoder.make_recipe(config)
  picture = recipe.sample({"autoencoder": model}, {})
  assert picture.shape == (128, 16 * 64, 3)
  first = emoji.load("heldout")[0]["image"]
  np.testing.assert_array_equal(picture[:64, :64], first)
