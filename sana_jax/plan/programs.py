"""What a pipeline compiles for pictures, with abstract models.

Nothing of full size is made: parameters are shapes.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.diffusion import schedules
from sana_jax.models import dc_ae, gemma2, sana
from sana_jax.models import tiling as tiling_lib
from sana_jax.pipeline import decoding, denoising, footprint, stages

TEXT_LENGTH = 300


class Models(NamedTuple):
  """Abstract models."""

  text_encoder: gemma2.Gemma2
  transformer: sana.SanaTransformer
  autoencoder: dc_ae.DCAE


class Program(NamedTuple):
  """One thing to compile.

  Attributes:
    beside: bytes the stage holds meanwhile that are no arguments of it.
  """

  stage: str
  name: str
  function: Callable[..., Any]
  model: Any
  args: tuple[Any, ...]
  beside: int = 0


def abstract_models(configs, dtype) -> Models:
  classes = (gemma2.Gemma2, sana.SanaTransformer, dc_ae.DCAE)
  return Models(
    *(
      jax.eval_shape(functools.partial(_build, cls, config, dtype))
      for cls, config in zip(classes, configs, strict=True)
    )
  )


def _build(cls, config, dtype):
  return cls.from_config(
    config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)
  )


def make_work(
  transformer: config_lib.SanaConfig,
  autoencoder: config_lib.DCAEConfig,
  *,
  height: int | None = None,
  width: int | None = None,
  batch: int = 1,
  guided: bool = True,
  token_length: int = 510,
) -> footprint.Work:
  """Says what a pipeline on one device is asked for.

  Raises:
    ValueError: a size that the autoencoder does not divide.
  """
  factor = autoencoder.spatial_compression
  side = transformer.sample_size * factor
  height, width = height or side, width or side
  if height % factor or width % factor:
    raise ValueError(
      f"height {height} and width {width} must be multiples of {factor}."
    )
  return footprint.Work(
    prompts=batch,
    images=batch,
    devices=1,
    branches=2 if guided else 1,
    token_length=token_length,
    text_length=TEXT_LENGTH,
    latent_size=(height // factor, width // factor),
    height=height,
    width=width,
  )


def programs(
  configs,
  models: Models,
  work: footprint.Work,
  how: decoding.Decoding,
  num_steps: int,
) -> Iterator[Program]:
  """Lists what the pipeline runs; of several shapes of tiles, the largest."""
  yield _text_encoder(models, work)
  yield _transformer(configs, models, work, num_steps)
  yield from _decoder(configs[2], models.autoencoder, work, how)


def _text_encoder(models: Models, work: footprint.Work) -> Program:
  def encode(model, input_ids, attention_mask, prefix):
    return stages.encode_text(
      text_encoder=model,
      input_ids=input_ids,
      attention_mask=attention_mask,
      prefix=prefix,
      max_sequence_length=work.text_length,
    )

  ids = _array((work.prompts, work.token_length), jnp.int32)
  prefix = None
  if work.instruction_length:
    prefix = jax.eval_shape(
      lambda model, ids: stages.read_prefix(text_encoder=model, input_ids=ids),
      models.text_encoder,
      _array((work.instruction_length,), jnp.int32),
    )
  read = work.token_length - work.instruction_length
  name = f"{read} of {work.token_length} tokens"
  args = (ids, ids, prefix)
  return Program("text encoder", name, encode, models.text_encoder, args)


def _transformer(
  configs, models: Models, work: footprint.Work, num_steps: int
) -> Program:
  text_config, config, _ = configs

  def denoise(model, schedule, scale, latents, condition, null_condition):
    return denoising.denoise(
      transformer=model,
      schedule=schedule,
      scales=denoising.Scales(scale, scale, scale, scale),
      latents=latents,
      condition=condition,
      null_condition=null_condition,
      timestep_scale=config.timestep_scale,
    )

  condition = denoising.Condition(
    _array((work.images, work.text_length, text_config.hidden_size)),
    _array((work.images, work.text_length), jnp.bool_),
  )
  latents = _array((work.images, *work.latent_size, config.in_channels))
  args = (
    schedules.FlowDPMSolver().schedule(num_steps),
    _array(()),
    latents,
    condition,
    condition if work.branches > 1 else None,
  )
  name = f"{num_steps} steps"
  return Program("transformer", name, denoise, models.transformer, args)


def _decoder(config, model, work, how: decoding.Decoding) -> Iterator[Program]:
  scaling = config.scaling_factor
  size = {"height": work.height, "width": work.width}
  latents = _array((work.images, *work.latent_size, config.latent_channels))
  if how.tiling is None:

    def decode(model, latents):
      return decoding.decode_whole(
        autoencoder=model,
        latents=latents,
        scaling_factor=scaling,
        one_at_a_time=how.separate,
        windows=how.windows,
        **size,
      )

    name = str(how.windows or "whole")
    yield Program("decoder", name, decode, model, (latents,))
    return

  def decode_tiles(model, latents):
    return decoding.decode_tiles(
      autoencoder=model, latents=latents, scaling_factor=scaling
    )

  factor = config.spatial_compression
  grid = tiling_lib.latent_grid(latents, how.tiling, factor)
  pieces = {
    shape: _array((len(places) * work.images, *shape, config.latent_channels))
    for shape, places in grid.places().items()
  }
  decoded = {
    shape: jax.eval_shape(decode_tiles, model, piece)
    for shape, piece in pieces.items()
  }
  largest = max(pieces)
  others = [tiles for shape, tiles in decoded.items() if shape != largest]
  height, width = (factor * side for side in largest)
  name = f"{pieces[largest].shape[0]} tiles of {height}x{width}"
  beside = footprint.nbytes(others)
  yield Program(
    "decoder", name, decode_tiles, model, (pieces[largest],), beside
  )
  stacked = {
    tuple(tiles.shape[1:3]): _array(
      (tiles.shape[0] // work.images, work.images, *tiles.shape[1:]),
      tiles.dtype,
    )
    for tiles in decoded.values()
  }

  def join(model, tiles):
    del model
    return decoding.join_tiles(tiles=tiles, grid=grid.scaled(factor), **size)

  yield Program("decoder", "blending", join, model, (stacked,))


def _array(shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)
