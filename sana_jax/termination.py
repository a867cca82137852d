"""Being told to stop."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


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
