"""Runs one after the other, each begun with what the one before has learned."""

import dataclasses
import json
from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from sana_jax import config as config_lib
from sana_jax.training import preemption
from sana_jax.training import step as step_lib

_FINISHED = "finished.json"

TrainFn = Callable[
  [config_lib.TextToImageConfig, epath.Path, preemption.StopRequest],
  step_lib.TrainState,
]
"""(config, work directory, what may ask it to stop) -> the state at its end."""


def train(
  config: config_lib.StagesConfig, workdir: epath.PathLike, train_one: TrainFn
) -> None:
  """Trains all stages, continuing what `workdir` holds.

  A stage that is finished is passed over. SIGTERM ends the one that runs, and
  no other begins, even where it comes after the last step, while that is saved
  or exported; the same call goes on from there.

  Raises:
    ValueError: a stage cannot be trained as it is described.
  """
  config.freeze()
  # One for all: what comes at the end of a stage is not lost with it.
  with preemption.stop_request() as stop:
    _train(config, epath.Path(workdir), train_one, stop)


def _train(
  config: config_lib.StagesConfig,
  workdir: epath.Path,
  train_one: TrainFn,
  stop: preemption.StopRequest,
) -> None:
  before: epath.Path | None = None
  for number, (name, stage) in enumerate(config.stages.items(), 1):
    directory = workdir / name
    what = f"stage {name} ({number} of {len(config.stages)})"
    if _finished_step(directory) >= stage.num_steps:
      logging.info("%s is finished", what)
    elif stop.reached():
      logging.warning("asked to stop: %s is not begun", what)
      return
    else:
      logging.info("%s", what)
      if stage.init_from is None and before is not None:
        stage = dataclasses.replace(stage, init_from=str(before))
      # Not kept: the next stage needs the room.
      step = int(train_one(stage, directory, stop).step)
      if step < stage.num_steps:
        logging.warning("%s was stopped at step %d", what, step)
        return
      _finish(directory, step)
    before = directory


def _finished_step(directory: epath.Path) -> int:
  """Returns the step that a stage has finished with; 0: it has not."""
  path = directory / _FINISHED
  return json.loads(path.read_text())["step"] if path.exists() else 0


def _finish(directory: epath.Path, step: int) -> None:
  # Written after the last checkpoint and the export. Renamed into place, so
  # that nobody reads half of it.
  if jax.process_index() == 0:
    partial = directory / f"{_FINISHED}.partial"
    partial.write_text(json.dumps({"step": step}))
    partial.replace(directory / _FINISHED)
