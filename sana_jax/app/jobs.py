"""An admitted request: where it stands, and what came of it."""

import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
import PIL.Image

from sana_jax.app.errors import CancelledError
from sana_jax.app.requests import GenerationRequest


class Update(NamedTuple):
  """Where a job stands.

  Attributes:
    stage: "queued", "encode", "denoise", "decode", and at the end "done",
      "failed" or "cancelled".
    position: of a queued job: how many are made before it, the one that is
      being made among them.
    step: calls of the transformer that are done.
    preview: what the images are becoming, side by side: uint8 [h, w, 3].
    compiling: a program is being built for this kind of request, once.
  """

  stage: str
  position: int = 0
  step: int = 0
  num_steps: int = 0
  preview: np.ndarray | None = None
  compiling: bool = False


class Result(NamedTuple):
  """What a job made.

  Attributes:
    images: as they are in `pngs`, text chunks among their `info`.
    pngs: files that say how they were made, like those of sample.py.
    settings: `GenerationRequest.settings`, nothing left open.
    warnings: of the pipeline, such as of a size that it was not trained at;
      the service fills them in.
  """

  images: list[PIL.Image.Image]
  pngs: list[bytes]
  seed: int
  settings: Mapping[str, Any]
  warnings: tuple[str, ...] = ()


class Job:
  """One request on its way; a service makes it, and any thread may ask it.

  Attributes:
    request: checked, and with a seed.
    future: of the `Result`.
  """

  def __init__(
    self,
    request: GenerationRequest,
    client: str,
    withdraw: Callable[["Job"], bool],
  ):
    self.id = uuid.uuid4().hex
    self.request = request
    self.client = client
    self.future: futures.Future[Result] = futures.Future()
    self._withdraw = withdraw
    self._changed = threading.Condition()
    self._update = Update("queued")
    self._version = 1
    self._stop: Exception | None = None

  def updates(self) -> Iterator[Update]:
    """Yields where the job stands, now and at every change, to the end.

    A slow reader misses what was between.
    """
    seen = 0
    while True:
      with self._changed:
        self._changed.wait_for(lambda: self._version != seen)  # noqa: B023
        update, seen = self._update, self._version
      yield update
      if update.stage in ("done", "failed", "cancelled"):
        return

  def result(self, timeout: float | None = None) -> Result:
    """Waits for the images.

    Raises:
      TimeoutError: they are not there after `timeout` seconds.
      InvalidRequestError: the pipeline could not take the request.
      ClosedError: the service ended before.
      CancelledError: the job was cancelled.
      JobError: something else went wrong.
    """
    return self.future.result(timeout)

  def cancel(self) -> None:
    """Gives the job up: at once if it waits, else after the step at hand."""
    self.stop(CancelledError("The request was cancelled."))
    if self._withdraw(self):
      self.end(error=self._stop)

  @property
  def done(self) -> bool:
    return self.future.done()

  def stop(self, reason: Exception) -> None:
    """Has `check_stopped` raise."""
    self._stop = self._stop or reason

  def check_stopped(self) -> None:
    """Raises what the job is to be ended with, if it is to be ended."""
    if self._stop is not None:
      raise self._stop

  def post(self, update: Update) -> None:
    """Says where the job stands."""
    with self._changed:
      self._update = update
      self._version += 1
      self._changed.notify_all()

  def end(
    self, result: Result | None = None, error: Exception | None = None
  ) -> None:
    """Ends the job, whichever way comes first."""
    try:
      if error is None:
        self.future.set_result(result)
      else:
        self.future.set_exception(error)
    except futures.InvalidStateError:
      return
    steps = (self._update.step, self._update.num_steps)
    stage = "done" if error is None else "failed"
    if isinstance(error, CancelledError):
      stage = "cancelled"
    self.post(Update(stage, 0, *steps, preview=self._update.preview))
