"""Traces of a few steps: those a flag names, or the next ones on a signal."""

import contextlib
import re
import signal
import threading
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

_STEPS_ON_SIGNAL = 3


def parse_steps(text: str) -> tuple[int, int]:
  """Returns the first and last step of "10:13" (13 included).

  Raises:
    ValueError: it is something else, or empty.
  """
  found = re.fullmatch(r"(\d+):(\d+)", text)
  first, last = map(int, found.groups()) if found else (0, 0)
  if not 1 <= first <= last:
    raise ValueError(
      f"--profile_steps must be FIRST:LAST with 1 <= FIRST <= LAST, such as "
      f"10:13, got {text!r}."
    )
  return first, last


def ignore_signal() -> None:
  """Lets SIGUSR1 do nothing where no `Profiler` listens.

  It would end the process, and there is nothing to profile before the first
  step, or between two stages.
  """
  signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class Profiler:
  """Writes traces to `workdir/profile`; SIGUSR1 asks for one.

  Args:
    window: first and last step to be traced, or None.
  """

  def __init__(self, workdir: epath.Path, window: tuple[int, int] | None):
    self._directory = workdir / "profile"
    self._window = window
    self._asked = threading.Event()
    self._last: int | None = None

  @contextlib.contextmanager
  def listening(self) -> Iterator[None]:
    """Listens for SIGUSR1 inside, and ends an open trace after it."""
    main = threading.current_thread() is threading.main_thread()
    if main:
      before = signal.getsignal(signal.SIGUSR1) or signal.SIG_DFL
      signal.signal(signal.SIGUSR1, lambda *_: self._asked.set())
    try:
      yield
    finally:
      if main:
        signal.signal(signal.SIGUSR1, before)
      self._stop()

  def before(self, step: int) -> None:
    """Begins a trace if it is time; `step` is about to run."""
    if self._last is not None:
      return
    if self._asked.is_set():
      self._asked.clear()
      self._last = step + _STEPS_ON_SIGNAL - 1
    elif self._window is not None and step in range(
      self._window[0], self._window[1] + 1
    ):
      # Of a run that goes on inside the window, what is left of it.
      self._last = self._window[1]
    if self._last is not None:
      logging.info("profiling steps %d to %d", step, self._last)
      jax.profiler.start_trace(str(self._directory))

  def after(self, step: int, outputs) -> None:
    """Ends the trace if `step`, which has these outputs, was its last."""
    if step == self._last:
      jax.block_until_ready(outputs)
      self._stop()

  def _stop(self) -> None:
    if self._last is not None:
      self._last = None
      jax.profiler.stop_trace()
      logging.info(
        "wrote a profile to %s (xprof or TensorBoard shows it)", self._directory
      )
