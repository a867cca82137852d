"""A queue in front of a pipeline: admission, turns, and a clean end."""

import copy
import dataclasses
import math
import secrets
import threading
import time
from collections.abc import Mapping
from concurrent import futures
from typing import Any

import jax
from absl import logging
from etils import epath

from sana_jax import notices
from sana_jax import pipeline as pipeline_lib
from sana_jax.app import making, requests
from sana_jax.app.adapters import Adapters
from sana_jax.app.errors import (
  BusyError,
  CancelledError,
  ClosedError,
  InvalidRequestError,
  JobError,
)
from sana_jax.app.jobs import Job, Result, Update
from sana_jax.app.limits import Limits
from sana_jax.app.waiting import FairQueue

# How long a step may take to end.
_STOP_SECONDS = 30.0
_CLOSED = "The server is shutting down; send the request again later."


class Service:
  """Makes images for many, one request at a time, clients in turn.

  One thread owns the pipeline; every method may be called from any other.

  Args:
    pipe: for this service alone; it keeps the transformer it has now.
    limits: of what is admitted; bounds that depend on the checkpoint are
      filled in.
    loras: directories or files of adapters, by the name requests give.
    made_with: see `making.Maker`.
    warm_up: compile what a plain request needs and fit the previews before the
      first one is served; without, there are no previews.

  Attributes:
    pipe: the pipeline without its text encoder, to ask what it could do.
    model_name: the checkpoint's.
    lora_names: what requests may name.
    ready: is set when the warm-up is over.

  Raises:
    FileNotFoundError: there is no such adapter.
    ValueError: an adapter that cannot be read, or does not fit.
  """

  def __init__(
    self,
    pipe: pipeline_lib.SanaPipeline,
    limits: Limits = Limits(),  # noqa: B008  frozen
    *,
    loras: Mapping[str, epath.PathLike] | None = None,
    made_with: Mapping[str, Any] | None = None,
    warm_up: bool = False,
  ):
    # For looking at: no job's sampler or adapter shows here, and what may leave
    # the devices is not held.
    self.pipe = copy.copy(pipe)
    self.pipe.text_encoder = None
    self.limits = limits.of(pipe)
    adapters = Adapters(pipe.transformer, loras or {})
    self.lora_names = adapters.names
    self.ready = threading.Event()
    self._maker = making.Maker(pipe, adapters, made_with)
    self.model_name = str(self._maker.made_with["checkpoint"])
    self._queue: FairQueue[Job] = FairQueue()
    self._changed = threading.Condition()
    self._running: Job | None = None
    self._closing = False
    self._job_seconds = 1.0  # a moving average
    self._thread = threading.Thread(
      target=self._work, args=(warm_up,), name="pipeline", daemon=True
    )
    self._thread.start()

  @property
  def made_with(self) -> Mapping[str, Any]:
    """What every image says of its checkpoint, device and versions."""
    return self._maker.made_with

  @property
  def num_waiting(self) -> int:
    return len(self._queue)

  @property
  def closing(self) -> bool:
    return self._closing

  def check(
    self, request: requests.GenerationRequest
  ) -> requests.GenerationRequest:
    """Returns the request as it would be admitted; see `requests.check`."""
    return requests.check(request, self.pipe, self.limits, self.lora_names)

  def submit(
    self,
    request: requests.GenerationRequest,
    client: str = "",
    *,
    user: str | None = None,
  ) -> Job:
    """Puts a request into the queue.

    Args:
      client: who asks; clients take turns.
      user: whom that client asks for, as it says; for the log.

    Raises:
      InvalidRequestError: it cannot be.
      BusyError: too many wait.
      ClosedError: the service is ending.
    """
    request = self.check(request)
    if request.seed is None:
      request = dataclasses.replace(request, seed=secrets.randbelow(2**32))
    job = Job(request, client, self._withdraw)
    with self._changed:
      if self._closing:
        raise ClosedError(_CLOSED)
      self._check_room(client)
      _log(job, user)
      self._queue.add(client, job)
      self._post_positions()
      self._changed.notify_all()
    return job

  def close(self, drain_seconds: float = 0.0) -> bool:
    """Admits nothing more, and ends.

    Args:
      drain_seconds: for this long requests that wait are still made; after it
        they are refused, and the one that is being made ends at its next step.

    Returns:
      Whether the thread has ended; compiling cannot be interrupted.
    """
    with self._changed:
      self._closing = True
      self._post_positions()  # who waits is to know
      self._changed.notify_all()
    self._thread.join(drain_seconds)
    with self._changed:
      refused = self._queue.order()
      self._queue = FairQueue()
      running = self._running
    for job in refused:
      job.end(error=ClosedError(_CLOSED))
    if running is not None:
      running.stop(ClosedError(_CLOSED))
    self._thread.join(_STOP_SECONDS)
    if running is not None:
      running.end(error=ClosedError(_CLOSED))  # if it hangs
    return not self._thread.is_alive()

  def _check_room(self, client: str) -> None:
    waiting, own = len(self._queue), self._queue.count(client)
    limits = self.limits
    problem = None
    if waiting >= limits.max_waiting:
      problem = f"{waiting} requests are waiting already"
    elif own >= limits.max_waiting_per_client:
      problem = f"{own} of your requests are waiting already"
    if problem is not None:
      seconds = max(1, math.ceil(self._job_seconds))
      raise BusyError(f"{problem}; try again in {seconds} s.", seconds)

  def _withdraw(self, job: Job) -> bool:
    with self._changed:
      there = self._queue.remove(job.client, job)
      self._post_positions()
      return there

  def _post_positions(self) -> None:
    ahead = int(self._running is not None)
    for position, job in enumerate(self._queue.order(), ahead):
      job.post(Update("queued", position))

  def _work(self, warm_up: bool) -> None:
    if warm_up:
      try:
        self._maker.warm_up(self._check_open)
      except ClosedError:
        logging.info("the warm-up was broken off")
      except Exception:  # requests may still be possible
        logging.exception("the warm-up failed; there are no previews")
    self.ready.set()
    while (job := self._next()) is not None:
      started = time.monotonic()
      self._make(job)
      seconds = time.monotonic() - started
      self._job_seconds += 0.3 * (seconds - self._job_seconds)
      del job  # lest its images are kept until the next one comes

  def _next(self) -> Job | None:
    with self._changed:
      self._running = None
      self._changed.wait_for(lambda: len(self._queue) or self._closing)
      if not self._queue:
        return None
      self._running = self._queue.take()
      self._post_positions()
      return self._running

  def _check_open(self) -> None:
    if self._closing:
      raise ClosedError(_CLOSED)

  def _make(self, job: Job) -> None:
    warnings: dict[str, None] = {}

    def tell(text: str) -> None:
      if text not in warnings:
        logging.warning("%s: %s", job.id, text)
      warnings[text] = None

    def post(update: Update) -> None:
      job.check_stopped()
      job.post(update)

    try:
      job.check_stopped()
      with notices.heard_by(tell):
        result = self._maker.make(job.request, post)
      job.end(result._replace(warnings=tuple(warnings)))
    except Exception as error:
      job.end(error=_explained(job, error))


def _log(job: Job, user: str | None) -> None:
  """Logs that a job is admitted, and how it will have ended."""
  started = time.monotonic()
  number = job.request.num_images
  images = "1 image" if number == 1 else f"{number} images"

  def log_end(future: futures.Future[Result]) -> None:
    seconds = time.monotonic() - started
    # asyncio cancels the future of whoever is cancelled while it waits.
    error = None if future.cancelled() else future.exception()
    if future.cancelled() or isinstance(error, CancelledError):
      logging.info("%s: cancelled after %.1f s", job.id, seconds)
    elif error is None:
      logging.info("%s: made %s, in %.1f s", job.id, images, seconds)
    else:
      told = " ".join(str(error).split())
      logging.warning("%s: failed after %.1f s: %s", job.id, seconds, told)

  logging.info(
    "%s: %s for %s, user %r", job.id, images, job.client or "this process", user
  )
  job.future.add_done_callback(log_end)


def _explained(job: Job, error: Exception) -> Exception:
  """Returns what the client is told; all else is in the log.

  Never `error` itself, whose traceback holds arrays.
  """
  if isinstance(error, CancelledError | ClosedError):
    return type(error)(str(error))
  if isinstance(error, ValueError):
    return InvalidRequestError(None, str(error))
  logging.error("%s: an error", job.id, exc_info=error)
  if isinstance(error, jax.errors.JaxRuntimeError) and (
    "RESOURCE_EXHAUSTED" in str(error)
  ):
    return JobError(
      "The devices are out of memory; ask for fewer or smaller images."
    )
  if isinstance(error, FloatingPointError):
    return JobError(str(error))
  return JobError("The images could not be made; the server's log says why.")
