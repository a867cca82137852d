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
  after `jax.distributed.initialize` only, listens for SIGTERM then, and has
  all of them agree on the step after the last that one has reached. So steps
  must count on from one run of a process to the next.

  Attributes:
    steps_before: what the runs before have counted to.
  """

  def __init__(self):
    self.steps_before = 0
    self._is_set, self._may_break_off = False, False

  def is_set(self) -> bool:
    return self._is_set

  def reached(self, step: int) -> bool:
    """Whether to stop after this step of the run; from then on it is set.

    To be called by all processes, once a step, with 0 before the first.
    """
    if not self._is_set:
      count = self.steps_before + step
      self._is_set = bool(ocp.multihost.reached_preemption(count))
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
