"""The computation of a pipeline: pure functions of models and arrays.

Each works under `jax.jit`. Samples of a batch do not influence each other, so a
batch may be cut over devices.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key, Real

from sana_jax import text
from sana_jax.diffusion import guidance, samplers, trigflow
from sana_jax.diffusion.schedules import Schedule
from sana_jax.models import tiling as tiling_lib


class Condition(NamedTuple):
  """What the transformer is told to draw."""

  states: Float[Array, "b l d"]
  mask: Bool[Array, "b l"]


def image_keys(seed: int, indices: Int[ArrayLike, "b"]) -> Key[Array, "b"]:
  """Gives every image its own key, whatever batch it is made in."""
  key = jax.random.key(seed)
  return jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)


def initial_latents(
  keys: Key[Array, "b"], shape: tuple[int, int, int]
) -> Float[Array, "b h w c"]:
  """Draws standard normal latents, each image from its own key."""
  return _normal(keys, 0, shape)


def step_noise(
  keys: Key[Array, "b"], num_steps: int, shape: tuple[int, int, int]
) -> Float[Array, "n b h w c"]:
  """Draws the noise that stochastic samplers add, each image from its key."""
  return jnp.stack(
    [_normal(keys, 1 + step, shape) for step in range(num_steps)]
  )


def encode_text(
  *,
  text_encoder: Any,
  input_ids: Int[Array, "b l"],
  attention_mask: Int[Array, "b l"],
  max_sequence_length: int,
) -> Condition:
  """Runs the text encoder and keeps the states of the prompt."""
  return Condition(
    *text.encode_tokens(
      text_encoder,
      input_ids,
      attention_mask,
      max_sequence_length=max_sequence_length,
    )
  )


def denoise(
  *,
  transformer: Any,
  schedule: Schedule,
  guidance_scale: Real[Array, ""],
  latents: Float[Array, "b h w c"],
  condition: Condition,
  null_condition: Condition | None = None,
  noise: Float[Array, "b n h w c"] | None = None,
  timestep_scale: float = 1.0,
  guidance_interval: tuple[float, float] | None = None,
  trajectory: bool = False,
) -> Any:
  """Samples with a flow model, from noise to latents.

  Args:
    null_condition: of the negative prompt; None: no classifier-free guidance.
    noise: for stochastic schedules.
    trajectory: True returns the parts of a `samplers.Trajectory`, the batch
      axis first.
  """

  def velocity(x, sigma, timestep, text_condition):
    del sigma
    return transformer(x, timestep * timestep_scale, *text_condition)

  if null_condition is None:
    velocity_fn = guidance.condition_on(velocity, condition)
  else:
    velocity_fn = guidance.classifier_free(
      velocity,
      condition,
      null_condition,
      scale=guidance_scale,
      interval=guidance_interval,
    )
  return _sample(velocity_fn, latents, schedule, noise, trajectory)


def denoise_sprint(
  *,
  transformer: Any,
  schedule: Schedule,
  guidance_scale: Real[Array, ""],
  latents: Float[Array, "b h w c"],
  condition: Condition,
  noise: Float[Array, "b n h w c"],
  sigma_data: float,
  guidance_embeds_scale: float,
  trajectory: bool = False,
) -> Any:
  """Samples with a SANA-Sprint model, from unit noise to latents.

  Args:
    guidance_scale: an input of the network.
    trajectory: as in `denoise`, in the sampler's units (times sigma_data).
  """
  embedded = jnp.full(
    latents.shape[:1], guidance_scale * guidance_embeds_scale, jnp.float32
  )

  def velocity(x, sigma, timestep):
    del sigma
    return transformer(x, timestep, *condition, guidance=embedded)

  prediction_fn = trigflow.prediction_fn(velocity, sigma_data=sigma_data)
  latents = latents * sigma_data
  result = _sample(prediction_fn, latents, schedule, noise, trajectory)
  return result if trajectory else result / sigma_data


def decode_raw(
  *,
  autoencoder: Any,
  latents: Float[Array, "b h w c"],
  scaling_factor: float,
  tiling: tiling_lib.Tiling | None,
) -> Float[Array, "b height width 3"]:
  """Decodes latents to images in about [-1, 1], in tiles if so wished."""
  latents = latents / scaling_factor
  if tiling is None:
    images = autoencoder.decode(latents)
  else:
    images = tiling_lib.decode(autoencoder, latents, tiling)
  return images.astype(jnp.float32)


def to_unit(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
  """Maps [-1, 1] to [0, 1], cutting off what lies outside."""
  # A maximum would turn NaN into a colour; `clip` hands it on to be noticed.
  return jnp.clip(images / 2 + 0.5, 0, 1)


def _sample(velocity_fn, latents, schedule, noise, trajectory: bool):
  if noise is not None:
    noise = noise.swapaxes(0, 1)
  if not trajectory:
    return samplers.sample(velocity_fn, latents, schedule, noise=noise)
  steps = samplers.sample_trajectory(
    velocity_fn, latents, schedule, noise=noise
  )
  return tuple(part.swapaxes(0, 1) for part in steps)


def _normal(keys: Array, index: int, shape) -> Float[Array, "b h w c"]:
  return jax.vmap(
    lambda key: jax.random.normal(jax.random.fold_in(key, index), shape)
  )(keys)
