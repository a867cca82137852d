"""How far a run is and how fast: compiling is told apart from running."""

import sys
import time
from collections.abc import Callable

import tqdm
from absl import logging

from sana_jax.pipeline import execution

# A log file needs no more than two lines a minute.
_LOG_INTERVAL = 30.0
_TERMINAL_INTERVAL = 0.5


class Meter:
  """Shows a progress bar, and measures.

  Args:
    total: images of this host.
    done: those that earlier processes made.
    started: when the program began, by `clock`.
  """

  def __init__(
    self,
    total: int,
    done: int,
    started: float,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._total = total
    self._done = done
    self._started = started
    self._clock = clock
    self._last = clock()
    self._compiled = False
    self._bar: tqdm.tqdm | None = None
    self._first_image: float | None = None
    self._steady_images = 0
    self._steady_seconds = 0.0

  def event(self, event: execution.Progress) -> None:
    """Takes note of a stage of the pipeline."""
    if event.phase != "compile":
      return
    self._compiled = True
    if event.seconds is None:
      return
    logging.info("%s: compiled in %.1f s", event.stage, event.seconds)
    if self._bar is not None:
      # As if the time had not passed: it says nothing about the speed.
      self._bar.start_t += event.seconds
      self._bar.last_print_t += event.seconds

  def batch_done(self, images: int) -> None:
    now = self._clock()
    self._done += images
    if self._first_image is None:
      self._first_image = now - self._started
      self._show()
    else:
      if not self._compiled:
        self._steady_images += images
        self._steady_seconds += now - self._last
      if self._bar is not None:
        self._bar.update(images)
    self._compiled = False
    self._last = now

  @property
  def seconds_to_first_image(self) -> float | None:
    return self._first_image

  @property
  def steady_images_per_second(self) -> float | None:
    """Of the batches after the first that compiled nothing; None: no such."""
    if not self._steady_seconds:
      return None
    return self._steady_images / self._steady_seconds

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def summary(self) -> str:
    if self._first_image is None:
      return "no image was made"
    rate = self.steady_images_per_second
    return f"time to first image {self._first_image:.1f} s, " + (
      f"steady images/s {rate:.2f}"
      if rate is not None
      else "steady images/s not measured (too few batches)"
    )

  def _show(self) -> None:
    if self._done == self._total:
      return
    # Begun after the first batch: its time says nothing about the others'.
    self._bar = tqdm.tqdm(
      total=self._total,
      initial=self._done,
      unit="image",
      mininterval=(
        _TERMINAL_INTERVAL if sys.stderr.isatty() else _LOG_INTERVAL
      ),
    )
