"""The training loop, the same for every recipe.

A recipe says what is trained; the loop says how: restore or initialise, step,
log, sample, save. The batch of a step is a pure function of (seed, step), so
the step number is all a resumed run needs to know about its input.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from sana_jax import checkpoint, sharding
from sana_jax import config as config_lib
from sana_jax.data import loader
from sana_jax.training import (
  compilations,
  metrics,
  placement,
  preemption,
)
from sana_jax.training import ledger as ledger_lib
from sana_jax.training import program as program_lib
from sana_jax.training import step as step_lib
from sana_jax.training import workdir as workdir_lib


class Recipe(NamedTuple):
  """What is trained.

  Attributes:
    init: key -> {component name: module}.
    param_axes: {component name: sharding rows of that module}.
    frozen: {name: arrays} the loss needs but does not train; what has sharding
      rows is sharded by them.
    loss_fn: (params, frozen, key, batch) -> (loss, scalars).
    batches: a host's part of the batches of all steps.
    sample: (averaged params, frozen) -> uint8 picture to look at; called, like
      `export`, by one process, with arrays that this process holds whole.
    export: (averaged params, frozen, directory) -> None; the run's product.
    num_shapes: how many shapes batches may have; each is compiled.
    name_shape: what the shape of a batch is called in the log.
    ledger: of the data, if they may change or be used in part.
  """

  init: Callable[[jax.Array], dict[str, Any]]
  param_axes: dict[str, sharding.ParamAxes]
  frozen: dict[str, Any]
  loss_fn: step_lib.LossFn
  batches: loader.HostBatches
  sample: Callable[[Any, Any], np.ndarray]
  export: Callable[[Any, Any, epath.Path], None]
  num_shapes: int = 1
  name_shape: Callable[[Any], str] = compilations.name_leaves
  ledger: ledger_lib.Ledger | None = None


def train(
  config: config_lib.TrainConfig, workdir: epath.PathLike, recipe: Recipe
) -> step_lib.TrainState:
  """Trains until `config.num_steps`, continuing what `workdir` holds.

  Raises:
    ValueError: `workdir` belongs to a run with another config, or other data.
    FloatingPointError: the loss is not finite.
  """
  config.freeze()
  workdir = epath.Path(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  workdir_lib.claim(config, workdir)
  if recipe.ledger is not None:
    recipe.ledger.begin(workdir)
  mesh = sharding.make_mesh(config.mesh)
  key_init, key_train = jax.random.split(jax.random.key(config.seed))
  program = program_lib.make_program(
    config,
    init=recipe.init,
    param_axes=recipe.param_axes,
    loss_fn=recipe.loss_fn,
    mesh=mesh,
  )
  checkpointer = checkpoint.Checkpointer(
    workdir, keep=config.checkpoints_to_keep
  )
  state = _restore_or_init(program, key_init, checkpointer)
  frozen = sharding.place(
    recipe.frozen,
    placement.frozen_shardings(recipe.frozen, recipe.param_axes, mesh),
  )
  writer = metrics.MetricWriter(
    workdir, enabled=jax.process_index() == 0, first_step=int(state.step)
  )
  try:
    state = _run(
      config,
      recipe,
      _Run(state, frozen, key_train, mesh, program.step, checkpointer, writer),
    )
    checkpointer.wait()
    if int(state.step) >= config.num_steps:
      whole = sharding.gather((state.ema, frozen))
      if jax.process_index() == 0:
        recipe.export(*whole, workdir / "export")
        logging.info("exported the averaged model to %s", workdir / "export")
  finally:
    checkpointer.close()
    writer.close()
  return state


class _Run(NamedTuple):
  """The objects of one process's run."""

  state: step_lib.TrainState
  frozen: Any
  key: jax.Array
  mesh: jax.sharding.Mesh
  train_step: Callable[..., Any]
  checkpointer: checkpoint.Checkpointer
  writer: metrics.MetricWriter


def _run(
  config: config_lib.TrainConfig, recipe: Recipe, run: _Run
) -> step_lib.TrainState:
  state, step = run.state, int(run.state.step)
  batches = placement.global_batches(
    recipe.batches, config, run.mesh, first_step=step
  )
  chrono = metrics.Chrono(step, config.num_steps, config.batch_size)
  compiled = compilations.Compilations(recipe.num_shapes, recipe.name_shape)
  if recipe.ledger is not None:
    recipe.ledger.note(step)
  with preemption.stop_request() as requested:
    while step < config.num_steps:
      batch = next(batches)
      state, scalars = _step(run, state, batch, compiled, chrono)
      step += 1
      last = step == config.num_steps
      if last or step % config.log_every == 0:
        _log(config, run, chrono, step, scalars)
        if recipe.ledger is not None:
          recipe.ledger.note(step)
      stop = requested.is_set() or run.checkpointer.reached_preemption(step)
      if stop or last or step % config.checkpoint_every == 0:
        # A checkpoint of a broken state would replace the last good one.
        _check_finite(step, scalars)
        with chrono.paused():
          run.checkpointer.save(step, state)
      if stop:
        logging.warning("asked to stop: saved step %d", step)
        break
      if last or step % config.sample_every == 0:
        # Waits for the step, whose time is no pause.
        _check_finite(step, scalars)
        with chrono.paused():
          _sample(recipe, run, state, step)
  return state


def _step(run, state, batch, compiled, chrono):
  """Runs a step; one that compiles first does not count for the speed."""
  if not compiled.is_new(batch):
    state, scalars = run.train_step(state, run.frozen, run.key, batch)
  else:
    with chrono.paused(steps=1):
      state, scalars = run.train_step(state, run.frozen, run.key, batch)
      jax.block_until_ready(scalars)
  compiled.count(run.train_step._cache_size())
  return state, scalars


def _log(config, run, chrono, step, scalars) -> None:
  _check_finite(step, scalars)
  values = {name: float(value) for name, value in scalars.items()}
  values |= chrono.tick(step)
  run.writer.scalars(step, values)
  metrics.log_line(step, config.num_steps, values)


def _sample(recipe, run, state, step) -> None:
  whole = sharding.gather((state.ema, run.frozen))
  if jax.process_index() == 0:
    run.writer.images(step, recipe.sample(*whole))


def _restore_or_init(program, key, checkpointer) -> step_lib.TrainState:
  step = checkpointer.latest_step()
  if step is None:
    logging.info("starting from scratch")
    return program.init(key)
  logging.info("resuming from step %d", step)
  return checkpointer.restore(step, program.state)


def _check_finite(step: int, scalars: dict[str, Any]) -> None:
  values = {name: float(scalars[name]) for name in ("loss", "grad_norm")}
  bad = {name: v for name, v in values.items() if not math.isfinite(v)}
  if bad:
    raise FloatingPointError(
      f"step {step}: {bad} is not finite. The last checkpoint is intact; lower "
      f"optim.peak_lr or optim.clip_norm, or set dtype='float32'."
    )
