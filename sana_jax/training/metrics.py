"""Numbers of a run: JSON lines, TensorBoard and one readable line."""

import contextlib
import json
import time
from collections.abc import Iterator

import numpy as np
import tensorboardX
from absl import logging
from etils import epath
from PIL import Image


class MetricWriter:
  """Writes scalars and image grids under a work directory (process 0 only).

  Args:
    first_step: where the run goes on; what an earlier, killed process wrote
      about later steps is dropped, for they are run again.
  """

  def __init__(self, workdir: epath.Path, *, enabled: bool, first_step: int):
    self._enabled = enabled
    if not enabled:
      return
    self._jsonl = workdir / "metrics.jsonl"
    _drop_rows_after(self._jsonl, first_step)
    self._samples = workdir / "samples"
    self._samples.mkdir(parents=True, exist_ok=True)
    self._board = tensorboardX.SummaryWriter(
      str(workdir / "tensorboard"), purge_step=first_step + 1
    )

  def scalars(self, step: int, values: dict[str, float]) -> None:
    if not self._enabled:
      return
    row = {"step": step, "time": round(time.time(), 2), **values}
    with self._jsonl.open("a") as file:
      file.write(json.dumps(row) + "\n")
    for name, value in values.items():
      self._board.add_scalar(name, value, step)
    self._board.flush()

  def images(self, step: int, grid: np.ndarray) -> None:
    """Writes a uint8 `[height, width, 3]` picture."""
    if not self._enabled:
      return
    with (self._samples / f"step_{step:07d}.png").open("wb") as file:
      Image.fromarray(grid).save(file, format="PNG")
    self._board.add_image("samples", grid, step, dataformats="HWC")

  def close(self) -> None:
    if self._enabled:
      self._board.close()


class Chrono:
  """Speed and remaining time; the first interval (compiling) is left out."""

  def __init__(self, first_step: int, num_steps: int, batch_size: int):
    self._num_steps = num_steps
    self._batch_size = batch_size
    self._last = (first_step, time.monotonic())
    self._started = False
    self._paused, self._paused_steps = 0.0, 0

  @contextlib.contextmanager
  def paused(self, *, steps: int = 0) -> Iterator[None]:
    """Excludes what happens inside from the speed: saving, compiling.

    Args:
      steps: that are made inside.
    """
    started = time.monotonic()
    yield
    self._paused += time.monotonic() - started
    self._paused_steps += steps

  def tick(self, step: int) -> dict[str, float]:
    """Returns images per second and seconds left since the last tick."""
    now = time.monotonic()
    steps = step - self._last[0] - self._paused_steps
    seconds = now - self._last[1] - self._paused
    self._last, self._paused, self._paused_steps = (step, now), 0.0, 0
    first, self._started = not self._started, True
    if first or steps <= 0 or seconds <= 0:
      return {}
    per_step = seconds / steps
    return {
      "images_per_second": self._batch_size / per_step,
      "seconds_per_step": per_step,
      "seconds_left": (self._num_steps - step) * per_step,
    }


def log_line(step: int, num_steps: int, values: dict[str, float]) -> None:
  """Prints step, share done, values and time left on one line."""
  left = values.get("seconds_left")
  shown = " ".join(
    f"{name} {value:.4g}"
    for name, value in values.items()
    if name not in ("seconds_left", "seconds_per_step")
  )
  eta = "" if left is None else f" eta {_clock(left)}"
  logging.info(
    "step %d/%d %.1f%% %s%s",
    step,
    num_steps,
    100 * step / num_steps,
    shown,
    eta,
  )


def _drop_rows_after(path: epath.Path, step: int) -> None:
  if not path.exists():
    return
  # A killed process may have left half a row at the end.
  rows = [row for row in path.read_text().splitlines(True) if row[-1] == "\n"]
  kept = [row for row in rows if json.loads(row)["step"] <= step]
  path.write_text("".join(kept))


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(int(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"
