"""Batches that are placed on the devices while the step before runs."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

# Seconds after which one who waits looks whether it should stop.
_POLL = 0.1
_END = object()


class Feed:
  """Runs an iterator in a thread, one batch ahead of who takes them.

  Attributes:
    waited: seconds that `next` has spent waiting so far.
  """

  def __init__(self, batches: Iterator[Any]):
    self.waited = 0.0
    self._seen: Any | None = None
    self._queue: queue.Queue[Any] = queue.Queue(1)
    self._closed = threading.Event()
    self._thread = threading.Thread(
      target=self._fill, args=(batches,), name="feed", daemon=True
    )
    self._thread.start()

  def peek(self, stopped: Callable[[], bool]) -> Any | None:
    """Returns what `next` will return; arguments and errors are its own."""
    if self._seen is None:
      self._seen = self.next(stopped)
    return self._seen

  def next(self, stopped: Callable[[], bool]) -> Any | None:
    """Returns the next batch; None: `stopped` became true while waiting.

    Raises:
      StopIteration: there are no more.
      Exception: whatever the iterator raised.
    """
    if self._seen is not None:
      seen, self._seen = self._seen, None
      return seen
    started = time.monotonic()
    try:
      while not stopped():
        try:
          item = self._queue.get(timeout=_POLL)
        except queue.Empty:
          continue
        if item is _END:
          raise StopIteration
        if isinstance(item, Exception):
          raise item
        return item
      return None
    finally:
      self.waited += time.monotonic() - started

  def close(self) -> None:
    """Ends the thread, unless it hangs in the iterator."""
    self._closed.set()
    self._thread.join(timeout=10 * _POLL)

  def _fill(self, batches: Iterator[Any]) -> None:
    try:
      for batch in batches:
        if not self._put(batch):
          return
      self._put(_END)
    # It is raised in the thread that waits for the batch.
    except Exception as error:
      self._put(error)

  def _put(self, item: Any) -> bool:
    while not self._closed.is_set():
      try:
        self._queue.put(item, timeout=_POLL)
        return True
      except queue.Full:
        continue
    return False
