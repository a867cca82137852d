"""Signals are heard, and then do what they did before."""

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


def test_ending_at_once_gives_the_handlers_back():
  numbers = (signal.SIGINT, signal.SIGTERM)
  before = [signal.getsignal(one) for one in numbers]
  with termination.ending_at_once("somebody"):
    during = [signal.getsignal(one) for one in numbers]
  assert set(during).isdisjoint(before)
  assert [signal.getsignal(one) for one in numbers] == before
