"""SIGTERM is heard once, and then does what it did before."""

import os
import signal
import threading

from sana_jax import termination


def test_sigterm_sets_the_event_and_the_old_handler_returns():
  heard = []
  before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
  try:
    with termination.sigterm_event() as stop:
      assert not stop.is_set()
      os.kill(os.getpid(), signal.SIGTERM)
      assert stop.is_set()
      assert heard == []
      os.kill(os.getpid(), signal.SIGTERM)
      assert heard == [1]
    os.kill(os.getpid(), signal.SIGTERM)
    assert heard == [1, 1]
  finally:
    signal.signal(signal.SIGTERM, before)


def test_outside_the_main_thread_nothing_changes():
  handler = signal.getsignal(signal.SIGTERM)
  seen = []

  def look():
    with termination.sigterm_event() as stop:
      seen.extend([stop.is_set(), signal.getsignal(signal.SIGTERM)])

  thread = threading.Thread(target=look)
  thread.start()
  thread.join()
  assert seen == [False, handler]
