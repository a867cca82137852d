"""Stopping in good order when the machine is wanted back."""

import contextlib
import signal
import threading
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
  """Yields an event that SIGTERM sets; a second SIGTERM ends the process.

  With several processes the event stays unset: they must stop at the same step,
  and JAX's preemption service (see `Checkpointer.reached_preemption`), which
  exists after `jax.distributed.initialize` only, listens for SIGTERM itself.
  """
  event = threading.Event()
  on_main_thread = threading.current_thread() is threading.main_thread()
  if jax.process_count() > 1 or not on_main_thread:
    yield event
    return

  def handle(signum, frame):
    del frame
    signal.signal(signum, before)
    event.set()

  # None: somebody's handler that is not written in Python.
  before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
  signal.signal(signal.SIGTERM, handle)
  try:
    yield event
  finally:
    signal.signal(signal.SIGTERM, before)
