"""Two sides in turn: their order, their number, and parity before all else."""

import os

import numpy as np
import pytest

from bench.harness import clocks, paired, sides


class Scripted:
  """A side whose repetitions take what we say, and that tells of them."""

  def __init__(self, name, log, *, foreign=0.0, output=1.0, wall=1.0):
    self.name, self.log = name, log
    self.rep = clocks.Rep(wall, wall, foreign, 0.0)
    self.output = output

  def prepare(self, name):
    self.log.append((self.name, name))
    return sides.Prepared({"y": np.full(3, self.output)}, 0.5, 1.5)

  def measure(self, calls):
    self.log.append((self.name, calls))
    return self.rep

  def memory(self):
    return {"peak_host_bytes": 7}

  def close(self):
    self.log.append((self.name, "closed"))


def compare(log, *, ours=None, theirs=None, tolerance=1e-5, **budget):
  return paired.compare(
    "case",
    Scripted("ours", log, **(ours or {})),
    Scripted("theirs", log, **(theirs or {})),
    tolerance=tolerance,
    budget=paired.Budget(**{"rep_seconds": 2.0, "warmups": 1} | budget),
  )


def test_sides_take_turns_after_warming_up():
  log = []
  found = compare(log, theirs={"wall": 4.0}, pairs=3)
  assert log == [
    *(("ours", "case"), ("theirs", "case")),
    *(("ours", 1), ("theirs", 1)),
    # Short calls are repeated.
    *(("ours", 2), ("theirs", 1)) * 3,
  ]
  assert found.summary.ratio.median == 0.25
  record = paired.record(found)
  assert record["ratio"]["median"] == 0.25
  assert record["first_seconds"] == {"ours": 1.5, "theirs": 1.5}
  assert record["memory"]["ours"] == {"peak_host_bytes": 7}
  assert len(record["reps"]) == 3


def test_a_disturbed_machine_does_not_hold_it_up_for_ever():
  found = compare([], ours={"foreign": 2.0}, pairs=3, max_pairs=5)
  assert (found.summary.kept, found.summary.pairs) == (0, 5)
  assert found.summary.basis == "cpu"


def test_time_that_is_up_ends_a_case_after_one_pair():
  assert compare([], seconds=0.0).summary.pairs == 1


def test_what_differs_is_not_timed():
  log = []
  with pytest.raises(AssertionError, match="y differs by 1.0e-03, more than"):
    compare(log, ours={"output": 1.001})
  assert log == [("ours", "case"), ("theirs", "case")]
  with pytest.raises(AssertionError, match="y differs by nan"):
    compare([], ours={"output": np.nan})


def test_outputs_of_other_names_or_shapes_are_refused():
  a, b = np.ones(3), np.ones((3, 1))
  with pytest.raises(AssertionError, match="outputs"):
    paired.check_parity("case", {"a": a}, {"b": a}, tolerance=1.0)
  with pytest.raises(AssertionError, match=r"shape \(3, 1\), not \(3,\)"):
    paired.check_parity("case", {"a": b}, {"a": a}, tolerance=1.0)


def test_one_side_alone_is_measured():
  seconds, prepared, memory = paired.alone(
    "case", Scripted("ours", [], wall=0.5), paired.Budget(pairs=2)
  )
  assert seconds == 0.5
  assert prepared.first_seconds == 1.5
  assert memory == {"peak_host_bytes": 7}


def test_a_local_side_runs_its_case():
  ran = []
  case = sides.Case(lambda: ran.append(1) or 5, lambda y: {"y": np.array(y)})
  side = sides.LocalSide({"five": lambda: case}, lambda: {"more": 3})
  with pytest.raises(ValueError, match="call prepare first"):
    side.measure(1)
  assert side.prepare("five").outputs == {"y": 5}
  assert side.measure(3).wall > 0
  assert len(ran) == 4
  assert side.memory()["more"] == 3
  assert side.memory()["peak_host_bytes"] > 2**20


@pytest.mark.slow
def test_a_side_in_another_process_does_the_same():
  side = sides.RemoteSide("tests.bench.remote_side", {"value": 2.5})
  try:
    assert side.prepare("square").outputs["y"] == 6.25
    assert side.measure(2).wall > 0
    assert side.memory()["process"] not in (0, os.getpid())
  finally:
    side.close()


@pytest.mark.slow
def test_a_side_that_fails_says_so():
  with pytest.raises(RuntimeError, match="ended with exit code 1"):
    sides.RemoteSide("tests.bench.remote_side", {"value": "no number"})
