"""What a run has for others at its end, written once."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from sana_jax import sharding
from sana_jax.training import launch

# Which step `export/` is of; written when all of it is.
_RECORD = "exported.json"


def export(
  write: Callable[[Any, Any, epath.Path], None],
  arrays: tuple[Any, Any],
  workdir: epath.Path,
  *,
  step: int,
  is_new: bool,
) -> None:
  """Gathers a model and writes it to `workdir/export`, if it is not there.

  All processes must call it.

  Args:
    write: see `recipe.Recipe.export`.
    arrays: averaged parameters and frozen ones.
    step: that they are of.
    is_new: whether this start of the run has learned anything; if so, what is
      there is of an earlier run, whatever its step.
  """
  directory = workdir / "export"
  launch.meet("export")
  # One process decides: the others might not yet see what it has written.
  is_done = not is_new and directory.exists() and _exported(workdir) == step
  if multihost_utils.broadcast_one_to_all(np.bool_(is_done)):
    logging.info(
      "%s has the averaged model of step %d; where it is deleted, the same "
      "command writes it again",
      *(directory, step),
    )
    return
  whole = sharding.gather(arrays)
  if whole is not None:
    record = workdir / _RECORD
    # Until all is written, what is there is of no step.
    record.unlink(missing_ok=True)
    write(*whole, directory)
    partial = workdir / f"{_RECORD}.partial"
    partial.write_text(json.dumps({"step": step}))
    partial.replace(record)
    logging.info("exported the averaged model to %s", directory)
  launch.meet("exported")


def _exported(workdir: epath.Path) -> int | None:
  path = workdir / _RECORD
  return json.loads(path.read_text())["step"] if path.exists() else None
