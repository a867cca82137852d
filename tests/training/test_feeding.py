"""Batches come in order, errors come through, and waiting can be given up."""

import itertools
import threading
import time

import pytest

from sana_jax.training import feeding


def never() -> bool:
  return False


@pytest.fixture
def feed():
  """Opens feeds and closes them."""
  opened = []

  def open_feed(batches):
    opened.append(feeding.Feed(iter(batches)))
    return opened[-1]

  yield open_feed
  for one in opened:
    one.close()


def test_a_batch_that_was_looked_at_still_comes(feed):
  one = feed(iter([3, 5]))
  found = [one.peek(never), one.peek(never), one.next(never), one.peek(never)]
  assert found == [3, 3, 3, 5]
  assert one.next(never) == 5
  with pytest.raises(StopIteration):
    one.peek(never)


def test_batches_come_in_order_and_one_ahead(feed):
  made = []

  def batches():
    for i in itertools.count():
      made.append(i)
      yield i

  found = feed(batches())
  assert [found.next(never) for _ in range(5)] == [0, 1, 2, 3, 4]
  time.sleep(0.3)
  # One waits in the queue, and one in the thread's hand.
  assert len(made) == 7


def test_what_reading_raises_is_raised_where_the_batch_is_taken(feed):
  def batches():
    yield 1
    raise ValueError("picture 7 is broken")

  found = feed(batches())
  assert found.next(never) == 1
  with pytest.raises(ValueError, match="picture 7 is broken"):
    found.next(never)


def test_an_end_is_an_end(feed):
  found = feed([1])
  assert found.next(never) == 1
  with pytest.raises(StopIteration):
    found.next(never)


def test_who_is_asked_to_stop_does_not_wait_for_slow_data(feed):
  slow = threading.Event()

  def batches():
    slow.wait(timeout=60)
    yield 1

  stop = threading.Event()
  threading.Timer(0.3, stop.set).start()
  found = feed(batches())
  started = time.monotonic()
  assert found.next(stop.is_set) is None
  assert 0.2 < time.monotonic() - started < 5
  assert found.waited == pytest.approx(time.monotonic() - started, abs=0.5)
  slow.set()


def test_a_closed_feed_reads_no_more(feed):
  found = feed(itertools.count())
  found.close()
  assert not [t for t in threading.enumerate() if t is found._thread]
