"""What surrounds the denoising: pure functions of models and arrays.

Each works under `jax.jit`. Samples of a batch do not influence each other, so a
batch may be cut over devices.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key

from sana_jax import text
from sana_jax.diffusion import schedules
from sana_jax.models import gemma2
from sana_jax.models import tiling as tiling_lib
from sana_jax.models import windows as windows_lib
from sana_jax.pipeline import checks
from sana_jax.pipeline.denoising import Condition


def image_keys(
  seeds: Int[ArrayLike, "b"], indices: Int[ArrayLike, "b"]
) -> Key[Array, "b"]:
  """Gives every image its own key, whatever batch it is made in."""
  return jax.vmap(lambda seed, i: jax.random.fold_in(jax.random.key(seed), i))(
    jnp.asarray(seeds, jnp.uint32), jnp.asarray(indices, jnp.uint32)
  )


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


def random_inputs(
  keys: Key[Array, "b"],
  shape: tuple[int, int, int],
  schedule: schedules.Schedule,
  *,
  latents: Float[ArrayLike, "b h w c"] | None,
  noise: Float[ArrayLike, "n b h w c"] | None,
) -> tuple[Float[ArrayLike, "b h w c"], Float[ArrayLike, "n b h w c"] | None]:
  """Draws latents and the noise of the steps, unless they are given.

  Raises:
    ValueError: something given has another shape, or is of no use.
  """
  count = keys.shape[0]
  if latents is None:
    latents = initial_latents(keys, shape)
  checks.check_shape("latents", latents, (count, *shape))
  if schedule.noise is None:
    if noise is not None:
      raise ValueError("noise given, but this solver is deterministic.")
    return latents, None
  if noise is None:
    noise = step_noise(keys, schedule.num_steps, shape)
  checks.check_shape("noise", noise, (schedule.num_steps, count, *shape))
  return latents, noise


def encode_text(
  *,
  text_encoder: Any,
  input_ids: Int[Array, "b l"],
  attention_mask: Int[Array, "b l"],
  max_sequence_length: int,
  prefix: gemma2.Prefix | None = None,
) -> Condition:
  """Runs the text encoder and keeps the states of the prompt.

  Args:
    prefix: of the ids that all rows begin with; None: they are read, too.
  """
  return Condition(
    *text.encode_tokens(
      text_encoder,
      input_ids,
      attention_mask,
      prefix=prefix,
      max_sequence_length=max_sequence_length,
    )
  )


def read_prefix(
  *, text_encoder: Any, input_ids: Int[Array, "p"]
) -> gemma2.Prefix:
  """Reads the instruction, for prompts to go on from."""
  return text_encoder.read_prefix(input_ids)


def decode_raw(
  *,
  autoencoder: Any,
  latents: Float[Array, "b h w c"],
  scaling_factor: float,
  tiling: tiling_lib.Tiling | windows_lib.Windows | None,
) -> Float[Array, "b height width 3"]:
  """Decodes latents to images in about [-1, 1], cut as one wishes."""
  latents = latents / scaling_factor
  if tiling is None:
    images = autoencoder.decode(latents)
  elif isinstance(tiling, windows_lib.Windows):
    images = windows_lib.decode(autoencoder, latents, tiling)
  else:
    images = tiling_lib.decode(autoencoder, latents, tiling)
  return images.astype(jnp.float32)


def to_unit(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
  """Maps [-1, 1] to [0, 1], cutting off what lies outside."""
  # A maximum would turn NaN into a colour; `clip` hands it on to be noticed.
  return jnp.clip(images / 2 + 0.5, 0, 1)


def _normal(keys: Array, index: int, shape) -> Float[Array, "b h w c"]:
  return jax.vmap(
    lambda key: jax.random.normal(jax.random.fold_in(key, index), shape)
  )(keys)
