"""Being told to stop."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn


@contextlib.contextmanager
def sigterm_event(
  on_signal: Callable[[], None] | None = None,
) -> Iterator[threading.Event]:
  """Yields an event that SIGTERM sets; a second SIGTERM ends the process.

  Outside the main thread Python has no signals, and the event stays unset.

  Args:
    on_signal: is called when it is set, and may raise in the main thread.
  """
  event = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield event
    return

  def handle(signum, frame):
    del frame
    signal.signal(signum, before)
    event.set()
    if on_signal is not None:
      on_signal()

  # None: somebody's handler that is not written in Python.
  before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
  signal.signal(signal.SIGTERM, handle)
  try:
    yield event
  finally:
    signal.signal(signal.SIGTERM, before)


def end_at_once(speaker: str, signum: int) -> NoReturn:
  """Ends the process with a line, by the exit code that shells give."""
  # Not through sys.stderr, in the middle of which a signal may come.
  os.write(2, f"{speaker}: ended by {signal.Signals(signum).name}\n".encode())
  os._exit(128 + signum)


@contextlib.contextmanager
def ending_at_once(speaker: str) -> Iterator[None]:
  """Has SIGINT and SIGTERM end the process with a line, and no traceback.

  The exit codes are 130 and 143. An exception would do less: a callback that it
  is raised in, such as of a garbage collection, swallows it.

  Args:
    speaker: begins the line.
  """
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def handle(signum, frame):
    del frame
    end_at_once(speaker, signum)

  numbers = (signal.SIGINT, signal.SIGTERM)
  before = {one: signal.getsignal(one) or signal.SIG_DFL for one in numbers}
  for one in numbers:
    signal.signal(one, handle)
  try:
    yield
  finally:
    for one, handler in before.items():
      signal.signal(one, handler)
