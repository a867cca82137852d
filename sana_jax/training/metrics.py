"""Numbers of a run: JSON lines, TensorBoard and one readable line."""

import json
import math
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import tensorboardX
from absl import logging
from etils import epath
from jaxtyping import UInt8
from PIL import Image

from sana_jax import config as config_lib

# Names in the log; those of the files are longer.
_SHORT = {"learning_rate": "lr"}
_FIRST = ("loss", "learning_rate", "grad_norm")
_SHOWN_BELOW = frozenset(
  {
    *("images_per_second", "images_per_second_per_device", "seconds_left"),
    *("seconds_per_step", "tflops_per_device", "mfu", "data_wait", "skipped"),
    *("hbm_peak_gib", "hbm_limit_gib"),
  }
)


class Sink(Protocol):
  """Another place that the numbers of a run go to."""

  def scalars(self, step: int, values: dict[str, float]) -> None: ...

  def images(self, step: int, name: str, grid: np.ndarray) -> None: ...

  def close(self) -> None: ...


class MetricWriter:
  """Writes scalars and image grids under a work directory (process 0 only).

  Args:
    sink: gets all of it, too.
    first_step: where the run goes on; what an earlier, killed process wrote
      about later steps is dropped, for they are run again.
  """

  def __init__(
    self,
    workdir: epath.Path,
    *,
    enabled: bool,
    first_step: int,
    sink: Sink | None = None,
  ):
    self._enabled, self._sink = enabled, sink
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
    # JSON has no name for the others.
    finite = {
      name: v if math.isfinite(v) else None for name, v in values.items()
    }
    row = {"step": step, "time": round(time.time(), 2), **finite}
    with self._jsonl.open("a") as file:
      file.write(json.dumps(row) + "\n")
    for name, value in finite.items():
      if value is not None:
        self._board.add_scalar(name, value, step)
    self._board.flush()
    if self._sink is not None:
      self._sink.scalars(step, values)

  def images(
    self, step: int, grid: UInt8[np.ndarray, "h w 3"], suffix: str = ""
  ) -> None:
    """Writes a picture.

    Args:
      suffix: tells apart the pictures of a step.
    """
    if not self._enabled:
      return
    name = f"samples{suffix}"
    with (self._samples / f"step_{step:07d}{suffix}.png").open("wb") as file:
      Image.fromarray(grid).save(file, format="PNG")
    self._board.add_image(name, grid, step, dataformats="HWC")
    if self._sink is not None:
      self._sink.images(step, name, grid)

  def close(self) -> None:
    if self._enabled:
      self._board.close()
      if self._sink is not None:
        self._sink.close()


class WindowMean:
  """The mean of a metric over the last window of steps, which ranks saves.

  Windows end at multiples of `checkpoint.every`, whatever is saved when, so a
  run that was stopped amid one ranks as the run that was not: what it knows of
  its window goes with the checkpoint, see `notes`.

  Args:
    first_step: where the run goes on.
    notes: `notes` as they were at that step; {}: there are none.
  """

  def __init__(
    self,
    config: config_lib.CheckpointConfig,
    *,
    first_step: int,
    notes: Mapping[str, Any],
  ):
    self._config, self._last = config, first_step
    # The sum is of the steps `first` to `last`.
    self._first, self._sum, self._count = first_step + 1, 0.0, 0
    if notes.get("metric") == config.best_metric:
      self._first = notes["first"]
      self._sum, self._count = notes["sum"], notes["count"]

  @property
  def notes(self) -> dict[str, Any]:
    return {
      "metric": self._config.best_metric,
      "first": self._first,
      "sum": self._sum,
      "count": self._count,
    }

  def add(self, step: int, values: Mapping[str, float]) -> None:
    """Adds the value of a step, unless it is not finite."""
    if self._start(step) != self._start(self._last):
      self._first, self._sum, self._count = step, 0.0, 0
    self._last = step
    value = values.get(self._config.best_metric, math.nan)
    if math.isfinite(value):
      self._sum += value
      self._count += 1

  def of(self, step: int) -> float:
    """Returns the mean of the window that ends with a step.

    It is the worst value where no window ends, where its first step is not
    known (that of a run with another `every`), or no value was finite: such a
    checkpoint loses to any other.
    """
    start = self._start(self._last)
    is_whole = step == start + self._config.every and self._first == start + 1
    if is_whole and self._count:
      return self._sum / self._count
    return math.inf if self._config.best_mode == "min" else -math.inf

  def _start(self, step: int) -> int:
    """Returns the step after which the window of this one begins."""
    return (step - 1) // self._config.every * self._config.every


def log_line(step: int, num_steps: int, values: dict[str, float]) -> None:
  """Prints what one wants to see of a step."""
  logging.info("%s", format_line(step, num_steps, values))


def format_line(step: int, num_steps: int, values: dict[str, float]) -> str:
  """Formats step, share done, metrics, speed and time left as one line.

  Metrics whose name has a "/" (parts of others) are left to the files.
  """
  parts = [f"step {step}/{num_steps} {100 * step / num_steps:.1f}%"]
  # Compiled functions return their numbers in the order of the alphabet.
  values = {name: values[name] for name in _FIRST if name in values} | values
  parts += [
    f"{_SHORT.get(name, name)} {value:.4g}"
    for name, value in values.items()
    if name not in _SHOWN_BELOW and "/" not in name
  ]
  if "skipped" in values and values["skipped"]:
    parts.append(f"skipped {values['skipped']:.0f}")
  if "images_per_second" in values:
    per_device = values["images_per_second_per_device"]
    parts.append(
      f"images/s {values['images_per_second']:.4g} ({per_device:.4g}/device)"
    )
  if "tflops_per_device" in values:
    parts.append(f"TFLOP/s/device {values['tflops_per_device']:.3g}")
  if "mfu" in values:
    parts.append(f"MFU {100 * values['mfu']:.1f}%")
  if "data_wait" in values:
    parts.append(f"data {100 * values['data_wait']:.1f}%")
  if "hbm_peak_gib" in values:
    limit = values.get("hbm_limit_gib")
    of = "" if limit is None else f"/{limit:.1f}"
    parts.append(f"HBM {values['hbm_peak_gib']:.1f}{of} GiB")
  if "seconds_left" in values:
    parts.append(f"eta {_clock(values['seconds_left'])}")
  return " ".join(parts)


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
