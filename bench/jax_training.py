"""Our side: the step that `training/program.py` compiles for a run."""

import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bench import jax_sampling, training_loads
from bench.harness import sides
from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.diffusion import flow
from sana_jax.models import sana
from sana_jax.training import budget, program
from sana_jax.training import step as step_lib
from sana_jax.weights import components

_AXES = {"transformer": sana.PARAM_AXES}


def make_side(size: str, directory: str) -> sides.LocalSide:
  """Offers the cases of a size, of parameters that are there."""
  cases = {
    name: functools.partial(
      _case, load, pathlib.Path(directory) / name / "transformer"
    )
    for name, load in training_loads.LOADS[size].items()
  }
  return sides.LocalSide(cases, jax_sampling.memory)


def run_config(load: training_loads.Load) -> config_lib.TextToImageConfig:
  """Returns the config of a run with such steps."""
  config = config_lib.TextToImageConfig(
    model=load.model(),
    batch_size=load.batch,
    optim=config_lib.OptimConfig(
      peak_lr=training_loads.LEARNING_RATE,
      warmup_steps=0,
      weight_decay=training_loads.WEIGHT_DECAY,
      clip_norm=training_loads.CLIP_NORM,
    ),
    ema_decay=training_loads.EMA_DECAY,
    dtype=load.dtype,
    remat=load.remat,
    # Faster on a CPU, for few blocks.
    scan_layers=jax.default_backend() != "cpu",
    mesh={"data": 1},
    max_sequence_length=load.text_length,
  )
  config.text_encoder.hidden_size = config.model.caption_channels
  config.data.synthetic = True
  config.freeze()
  return config


def make_program(load: training_loads.Load, init) -> program.Program:
  """Builds the step; what it draws at random comes with the batch."""

  def loss_fn(params, frozen, key, batch):
    del frozen, key
    noisy = flow.interpolate(batch["latents"], batch["noise"], batch["sigma"])
    velocity = params["transformer"](
      noisy,
      flow.NUM_TRAIN_TIMESTEPS * batch["sigma"],
      batch["text"],
      batch["text_mask"],
    )
    return flow.loss(
      velocity, flow.velocity(batch["latents"], batch["noise"])
    ), {}

  return program.make_program(
    run_config(load),
    init=init,
    param_axes=_AXES,
    loss_fn=loss_fn,
    mesh=sharding.make_mesh({"data": 1}, jax.devices()[:1]),
  )


def memory_by_category(load: training_loads.Load) -> dict[str, int]:
  """Returns the bytes of a step: its state, its batch, what XLA adds."""
  made = make_program(load, fresh(load))
  batch = next(training_loads.batches(load))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
  stats = (
    made.step.lower(made.state, {}, jax.random.key(0), shapes)
    .compile()
    .memory_analysis()
  )
  return budget.state_budget(made.state) | {
    "batch": sum(array.nbytes for array in batch.values()),
    "temporaries": stats.temp_size_in_bytes,
    "code": stats.generated_code_size_in_bytes,
  }


def fresh(load: training_loads.Load) -> Callable[..., dict[str, Any]]:
  """Returns what draws fresh parameters from a key."""
  config = run_config(load)

  def init(key: jax.Array) -> dict[str, Any]:
    model = sana.SanaTransformer.from_config(
      config.model,
      dtype=jnp.dtype(config.dtype),
      scan=config.scan_layers,
      remat=config.remat,
      rngs=nnx.Rngs(key),
    )
    return {"transformer": model}

  return init


def _case(load: training_loads.Load, path: pathlib.Path) -> sides.Case:
  made = make_program(load, fresh(load))
  config = run_config(load)
  model, _ = components.load_transformer(
    path,
    dtype=jnp.dtype(config.dtype),
    param_dtype=jnp.float32,
    scan=config.scan_layers,
    remat=config.remat,
    fp16_clamp=False,
  )
  start = jax.jit(
    lambda params: step_lib.init_state(params, made.tx),
    out_shardings=jax.tree.map(lambda leaf: leaf.sharding, made.state),
  )
  state = start({"transformer": model})
  # Two batches, over and over: making them is no part of a step.
  some = itertools.islice(training_loads.batches(load), 2)
  batches = itertools.cycle([jax.device_put(batch) for batch in some])
  key = jax.random.key(0)

  def run():
    nonlocal state
    state, scalars = made.step(state, {}, key, next(batches))
    return jax.block_until_ready(scalars)

  def outputs(first):
    told = [first, run()]
    return {
      name: np.array([float(step[name]) for step in told])
      for name in ("loss", "grad_norm")
    }

  return sides.Case(run, outputs)
