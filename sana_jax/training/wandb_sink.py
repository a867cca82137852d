"""Numbers of a run on Weights & Biases, for those who installed it."""

import importlib.util
import secrets
from typing import Any

import numpy as np
from etils import epath

_STEP = "train_step"


def check_installed() -> None:
  """Raises ModuleNotFoundError unless there is a wandb to import."""
  if importlib.util.find_spec("wandb") is None:
    raise ModuleNotFoundError(
      "--wandb_project needs the package wandb: pip install sana_jax[wandb], "
      "or leave the flag out; metrics.jsonl and TensorBoard are written anyway."
    )


class WandbSink:
  """Sends a run to a project; a resumed run goes on in the same place.

  Args:
    workdir: keeps the run's id, in `wandb_id`.
    config: the run's, for the project's table.
  """

  def __init__(self, workdir: epath.Path, project: str, config: dict[str, Any]):
    check_installed()
    # An optional dependency, and slow to import.
    import wandb  # noqa: PLC0415

    self._wandb = wandb
    path = workdir / "wandb_id"
    if not path.exists():
      path.write_text(secrets.token_hex(8))
    self._run = wandb.init(
      project=project,
      id=path.read_text(),
      resume="allow",
      dir=str(workdir),
      name=workdir.name,
      config=config,
    )
    # Its own counter cannot go back, as a run does that was killed.
    self._run.define_metric(_STEP)
    self._run.define_metric("*", step_metric=_STEP)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    self._run.log({_STEP: step, **values})

  def images(self, step: int, name: str, grid: np.ndarray) -> None:
    self._run.log({_STEP: step, name: self._wandb.Image(grid)})

  def close(self) -> None:
    self._run.finish()
