"""Stopping in good order when the machine is wanted back."""

import contextlib
import threading
from collections.abc import Iterator

import jax

from sana_jax import termination


@contextlib.contextmanager
def stop_request() -> Iterator[threading.Event]:
  """Yields an event that SIGTERM sets; a second SIGTERM ends the process.

  With several processes the event stays unset: they must stop at the same step,
  and JAX's preemption service (see `Checkpointer.reached_preemption`), which
  exists after `jax.distributed.initialize` only, listens for SIGTERM itself.
  """
  if jax.process_count() > 1:
    yield threading.Event()
    return
  with termination.sigterm_event() as event:
    yield event
