"""Stopping in good order when the machine is wanted back."""

import contextlib
from collections.abc import Iterator

import jax
import orbax.checkpoint as ocp

from sana_jax import termination


class InterruptedBySigtermError(Exception):
  """SIGTERM came where it may break off what is going on."""


class StopRequest:
  """Whether this process was asked to stop.

  Several must stop at the same step. JAX's preemption service, which exists
  after `jax.distributed.initialize` only, listens for SIGTERM then. Every
  process tells it a number, again and again, and all are to stop at the one
  after the highest so far, which is 0 before the first. So the calls are
  counted: steps do not begin at 1 in a run that goes on, and begin anew with
  every stage. One request is for all that a process trains.
  """

  def __init__(self):
    self._calls = 0
    self._is_set, self._may_break_off = False, False

  def is_set(self) -> bool:
    return self._is_set

  def reached(self) -> bool:
    """Whether to stop here; from then on it is set.

    All processes must call it equally often, and at the same places: after a
    step, which none makes alone, or before a stage.
    """
    if not self._is_set:
      self._calls += 1
      self._is_set = bool(ocp.multihost.reached_preemption(self._calls))
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
