"""Compares the memory a pipeline is predicted to need with what XLA allocates.

python -m bench.memory --config=sana_1600m_4k --topology=v5e:2x2

Compiles the stages ahead of time for one chip of a TPU that need not be there;
`pip install "jax[tpu]"` brings the compiler. Parameters are abstract: nothing
of full size is made. A decoder may take minutes to compile.
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from etils import epath
from flax import nnx

from bench import topology as topology_lib
from sana_jax import config as config_lib
from sana_jax.diffusion import schedules
from sana_jax.models import dc_ae, gemma2, sana
from sana_jax.models import tiling as tiling_lib
from sana_jax.pipeline import decoding, denoising, footprint, memory, stages

_CONFIGS = {
  function.__name__: function
  for function in (
    config_lib.sana_600m,
    config_lib.sana_1600m,
    config_lib.sana_1600m_2k,
    config_lib.sana_1600m_4k,
    config_lib.sana15_1600m,
    config_lib.sana15_4800m,
  )
}
_CONFIG = flags.DEFINE_enum(
  "config", "sana_1600m_4k", list(_CONFIGS), "Of the transformer."
)
_HEIGHT = flags.DEFINE_integer("height", None, "Pixels; None: as trained.")
_WIDTH = flags.DEFINE_integer("width", None, "Pixels; None: as trained.")
_BATCH = flags.DEFINE_integer("batch_size", 1, "Images.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 20, "Of the sampler.", lower_bound=1)
_GUIDED = flags.DEFINE_boolean("guidance", True, "Classifier-free guidance.")
_TOKENS = flags.DEFINE_integer(
  "token_length", 510, "Tokens of prompt and instruction.", lower_bound=300
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["float32", "bfloat16"], "Of weights and computation."
)
_TILE = flags.DEFINE_integer("vae_tile", None, "None: as planned.")
_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x2", "One chip is used.")
_STAGES = flags.DEFINE_multi_enum(
  "stage", memory.STAGES, memory.STAGES, "Which to compile; repeatable."
)
_OUTPUT = flags.DEFINE_string("output", None, "JSON file of the figures.")

_TEXT_LENGTH = 300
_GIB = 2**30


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


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  mesh = topology_lib.one_chip(_TOPOLOGY.value)
  available = topology_lib.HBM_BYTES[_TOPOLOGY.value.partition(":")[0]]
  configs = (
    config_lib.Gemma2Config(),
    _CONFIGS[_CONFIG.value](),
    config_lib.DCAEConfig(),
  )
  models = abstract_models(configs, jnp.dtype(_DTYPE.value))
  parts = map(footprint.make_part, configs, models)
  sizes = footprint.Models(*parts, platform="tpu")
  work = make_work(
    configs[1],
    configs[2],
    height=_HEIGHT.value,
    width=_WIDTH.value,
    batch=_BATCH.value,
    guided=_GUIDED.value,
    token_length=_TOKENS.value,
  )
  plan = memory.plan(
    sizes,
    work,
    policy=memory.Policy(),
    tiling=tiling_lib.square(_TILE.value) if _TILE.value else None,
    available=available,
  )
  _print(f"{_CONFIG.value}, {_DTYPE.value}, {_TOPOLOGY.value}: {plan.reason}")
  records = []
  for program in programs(configs, models, work, plan.decoding, _STEPS.value):
    if program.stage in _STAGES.value:
      records.append(measure(program, mesh, plan, available))
      _print(describe(records[-1]))
  if _OUTPUT.value:
    epath.Path(_OUTPUT.value).write_text(
      json.dumps({"plan": plan.reason, "programs": records}, indent=1)
    )


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
    text_length=_TEXT_LENGTH,
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
  def encode(model, input_ids, attention_mask):
    return stages.encode_text(
      text_encoder=model,
      input_ids=input_ids,
      attention_mask=attention_mask,
      max_sequence_length=work.text_length,
    )

  ids = _array((work.prompts, work.token_length), jnp.int32)
  name = f"{work.token_length} tokens"
  return Program("text encoder", name, encode, models.text_encoder, (ids, ids))


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
        one_at_a_time=how.one_at_a_time,
        **size,
      )

    yield Program("decoder", "whole", decode, model, (latents,))
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


def measure(program: Program, mesh, plan: memory.Plan, available: int):
  """Compiles a program; returns a record of bytes, predicted and XLA's."""
  start = time.monotonic()
  sizes = topology_lib.memory_analysis(
    program.function, mesh, program.model, *program.args
  )
  need = plan.needs[program.stage]
  inputs = footprint.nbytes(program.args)
  working = (
    inputs
    + sizes.output_size_in_bytes
    - sizes.alias_size_in_bytes
    + sizes.temp_size_in_bytes
    + sizes.generated_code_size_in_bytes
    + program.beside
  )
  total = need.weights + working
  return {
    "stage": program.stage,
    "program": program.name,
    "weights": need.weights,
    "predicted": need.working,
    "inputs": inputs + program.beside,
    "temporaries": sizes.temp_size_in_bytes,
    "outputs": sizes.output_size_in_bytes,
    "code": sizes.generated_code_size_in_bytes,
    "working": working,
    "total": total,
    "fits": total <= available,
    "compile_seconds": round(time.monotonic() - start),
  }


def describe(record: dict[str, Any]) -> str:
  gib = {
    name: f"{value / _GIB:.2f}"
    for name, value in record.items()
    if isinstance(value, int)
  }
  return (
    f"{record['stage']:13} {record['program']:24} weights {gib['weights']} + "
    f"working {gib['working']} (inputs {gib['inputs']}, temporaries "
    f"{gib['temporaries']}, outputs {gib['outputs']}, code {gib['code']}; "
    f"predicted {gib['predicted']}) = {gib['total']} GiB, fits: "
    f"{'yes' if record['fits'] else 'NO'}, compiled in "
    f"{record['compile_seconds']} s"
  )


def _array(shape, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _print(line: str) -> None:
  sys.stdout.write(line + "\n")
  sys.stdout.flush()


if __name__ == "__main__":
  app.run(main)
