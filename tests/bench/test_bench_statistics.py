"""Clocks, pairs and their ratios, with clocks that we make up."""

import itertools

import numpy as np
import pytest

from bench.harness import clocks, statistics


def rep(wall, *, cpu=None, foreign=0.0, steal=0.0):
  return clocks.Rep(wall, 2 * wall if cpu is None else cpu, foreign, steal)


def pair(ours, theirs, **disturbances):
  return statistics.Pair(rep(ours), rep(theirs, **disturbances))


def test_a_repetition_is_what_the_clocks_advance_by():
  readings = iter(
    [
      clocks.Reading(10.0, 4.0, 100.0, 7.0),
      clocks.Reading(12.0, 7.0, 104.0, 8.0),
    ]
  )
  calls = itertools.count()
  found = clocks.repeat(lambda: next(calls), 4, clock=lambda: next(readings))
  assert next(calls) == 4
  # Of two seconds: 3 s of our own, 1 s of another process, 1 s stolen.
  assert found == pytest.approx((0.5, 0.75, 0.5, 0.5))
  assert found.disturbance == pytest.approx(1.0)


def test_a_clock_of_the_system_that_lags_is_nobody_else():
  readings = iter(
    [clocks.Reading(0.0, 0.0, 0.0, 0.0), clocks.Reading(0.1, 0.2, 0.15, 0.0)]
  )
  found = clocks.repeat(int, clock=lambda: next(readings))
  assert found.foreign == 0


def test_the_real_clocks_go_forward():
  start = clocks.read()
  np.linalg.svd(np.random.default_rng(0).normal(size=(200, 200)))
  stop = clocks.read()
  assert stop.wall > start.wall
  assert stop.cpu > start.cpu
  assert stop.busy >= start.busy
  assert stop.steal >= start.steal


@pytest.mark.parametrize(
  ("seconds", "calls"), [(0.1, 3), (0.3, 1), (5.0, 1), (0.0, 250_000)]
)
def test_short_calls_fill_a_repetition(seconds, calls):
  assert clocks.calls_for(seconds, 0.25) == calls


def test_disturbed_pairs_are_left_out():
  pairs = [pair(1.0, 2.0) for _ in range(4)]
  pairs += [pair(1.0, 100.0, foreign=0.2, steal=0.2) for _ in range(6)]
  found = statistics.summarise(pairs)
  assert found.basis == "wall"
  assert found.ratio.median == 0.5
  assert (found.kept, found.pairs) == (4, 10)
  assert (found.ours, found.theirs) == (1.0, 2.0)
  # Processor time is of all of them.
  assert found.cpu_ratio.median == pytest.approx(0.01)
  assert found.foreign == pytest.approx(6 * 0.2 / 20)
  assert found.steal == pytest.approx(6 * 0.2 / 20)


def test_without_undisturbed_pairs_processor_time_counts():
  disturbed = statistics.Pair(
    rep(9.0, cpu=1.0, steal=1.5), rep(3.0, cpu=2.0, foreign=1.5)
  )
  found = statistics.summarise([disturbed] * 5 + [pair(1.0, 1.0)])
  assert found.basis == "cpu"
  assert found.ratio.median == 0.5
  assert (found.ours, found.theirs) == (1.0, 2.0)
  assert found.kept == 1


def test_no_pairs_are_refused():
  with pytest.raises(ValueError, match="no pair of repetitions"):
    statistics.summarise([])


def test_the_interval_holds_the_median_and_narrows_with_more_pairs():
  rng = np.random.default_rng(3)

  def interval(count):
    theirs = rng.uniform(1, 2, count)
    ours = theirs * 0.8 * np.exp(rng.normal(0, 0.1, count))
    found = statistics.ratio_of(ours, theirs)
    assert found.low <= found.median <= found.high
    return found

  few, many = interval(9), interval(900)
  assert many.high - many.low < 0.5 * (few.high - few.low)
  # The median of exp(normal) is 1; 0.1 / sqrt(900) times 1.25 is its error.
  assert many.median == pytest.approx(0.8, rel=0.02)


def test_ratios_of_a_pair_cancel_what_slows_both():
  slow = np.random.default_rng(0).uniform(1, 10, 9)
  found = statistics.ratio_of(0.7 * slow, slow)
  assert found == pytest.approx((0.7, 0.7, 0.7))
