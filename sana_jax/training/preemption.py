"""Stopping in good order when the machine is wanted back."""

import contextlib
from collections.abc import Iterator

import jax

from sana_jax import termination


class InterruptedBySigtermError(Exception):
  """SIGTERM came where it may break off what is going on."""


class StopRequest:
  """Whether this process was asked to stop.

  With several processes it never is: they must stop at the same step, and JAX's
  preemption service (see `Checkpointer.reached_preemption`), which exists after
  `jax.distributed.initialize` only, listens for SIGTERM itself.
  """

  def __init__(self):
    self._is_set, self._may_break_off = False, False

  def is_set(self) -> bool:
    return self._is_set

  def set(self) -> None:
    """Records the request; raises inside `breaking_off`."""
    self._is_set = True
    if self._may_break_off:
      self._may_break_off = False
      raise InterruptedBySigtermError

  @contextlib.contextmanager
  def breaking_off(self) -> Iterator[None]:
    """Lets a request break off what happens inside, which is no error.

    For what takes long and may be lost, such as sampling.
    """
    self._may_break_off = True
    try:
      yield
    except InterruptedBySigtermError:
      pass
    finally:
      self._may_break_off = False


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
  """Yields what SIGTERM sets; a second SIGTERM ends the process."""
  request = StopRequest()
  if jax.process_count() > 1:
    yield request
    return
  with termination.sigterm_event(request.set):
    yield request
