"""The recipe that trains a DCAE to reconstruct images."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Float, UInt8

from sana_jax import config as config_lib
from sana_jax.data import examples, loader, names
from sana_jax.models import dc_ae
from sana_jax.training import recipe as recipe_lib
from sana_jax.weights import components

_SHOWN = 16


def make_recipe(config: config_lib.AutoencoderConfig) -> recipe_lib.Recipe:
  """Builds model, data and loss of `config`."""

  def init(key: jax.Array) -> dict[str, dc_ae.DCAE]:
    model = dc_ae.DCAE.from_config(
      config.model,
      dtype=jnp.dtype(config.dtype),
      remat=config.remat,
      rngs=nnx.Rngs(key),
    )
    return {"autoencoder": model}

  def loss_fn(params, frozen, key, batch):
    del frozen
    return reconstruction_loss(
      params["autoencoder"], key, batch["images"], config
    )

  source = examples.load_source(config.data)
  images = np.stack(
    [
      examples.to_unit_range(source[i]["image"])
      for i in np.linspace(0, len(source) - 1, _SHOWN).astype(int)
    ]
  )
  reconstruct = jax.jit(lambda model, x: model.decode(model.encode(x)))

  def sample(params, frozen) -> UInt8[np.ndarray, "h w 3"]:
    del frozen
    decoded = reconstruct(on_one_device(params["autoencoder"]), images)
    return side_by_side(images, np.asarray(decoded))

  def export(params, frozen, directory: epath.Path) -> None:
    del frozen
    model = params["autoencoder"]
    factor = scaling_factor(model, config.data)
    components.save_autoencoder(
      directory / "vae", model, _with_scaling(config.model, factor)
    )

  return recipe_lib.Recipe(
    init=init,
    param_axes={"autoencoder": dc_ae.PARAM_AXES},
    frozen={},
    loss_fn=loss_fn,
    batches=loader.example_batches(
      examples.image_examples(config.data, config.seed), config.batch_size
    ),
    sample=sample,
    export=export,
    name_batch=names.of_examples(
      examples.names(config.data, config.seed), config.batch_size
    ),
  )


def reconstruction_loss(
  model: dc_ae.DCAE,
  key: jax.Array,
  images: Float[Array, "b h w 3"],
  config: config_lib.AutoencoderConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes l1 + l2_weight * l2 + latent_penalty * mean(z^2).

  The decoder sees z + latent_noise * noise, which teaches it to forgive what a
  sampler gets slightly wrong; the penalty keeps z from outgrowing the noise.
  """
  latents = model.encode(images).astype(jnp.float32)
  noise = jax.random.normal(key, latents.shape, jnp.float32)
  decoded = model.decode(latents + config.latent_noise * noise)
  error = decoded.astype(jnp.float32) - images
  l1, l2 = jnp.abs(error).mean(), jnp.square(error).mean()
  penalty = jnp.square(latents).mean()
  loss = l1 + config.l2_weight * l2 + config.latent_penalty * penalty
  # Images span [-1, 1]: the peak of the signal is 2.
  psnr = 10 * jnp.log10(4 / l2)
  return loss, {"l1": l1, "psnr": psnr, "latent_rms": jnp.sqrt(penalty)}


def scaling_factor(
  model: dc_ae.DCAE, config: config_lib.DataConfig, *, count: int = 512
) -> float:
  """Measures 1 / std(latents), so that scaled latents have unit variance."""
  source = examples.load_source(config)
  encode = jax.jit(dc_ae.DCAE.encode)
  model = on_one_device(model)
  indices = np.linspace(0, len(source) - 1, min(count, len(source)))
  batches = np.array_split(indices.astype(int), max(len(indices) // 32, 1))
  latents = [
    np.asarray(
      encode(
        model,
        np.stack([examples.to_unit_range(source[i]["image"]) for i in batch]),
      )
    )
    for batch in batches
  ]
  return float(1 / np.concatenate(latents).std())


def on_one_device(model: dc_ae.DCAE) -> dc_ae.DCAE:
  """Puts a model where programs run that are not written for a mesh."""
  return jax.device_put(model, jax.local_devices()[0])


def side_by_side(
  images: Float[np.ndarray, "n h w 3"], decoded: Float[np.ndarray, "n h w 3"]
) -> UInt8[np.ndarray, "rows columns 3"]:
  """Stacks a row of originals on a row of reconstructions."""
  rows = [np.concatenate(list(row), axis=1) for row in (images, decoded)]
  grid = np.concatenate(rows, axis=0)
  return np.clip(np.round((grid + 1) * 127.5), 0, 255).astype(np.uint8)


def _with_scaling(
  config: config_lib.DCAEConfig, factor: float
) -> config_lib.DCAEConfig:
  values = config.to_dict() | {"scaling_factor": factor}
  return config_lib.from_dict(config_lib.DCAEConfig, values)
