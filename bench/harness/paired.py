"""Measures two sides in turn, after checking that they compute the same."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from bench.harness import clocks, sides, statistics


class Budget(NamedTuple):
  """How much is measured.

  Attributes:
    pairs: undisturbed ones that are wanted.
    max_pairs: that are made at most to get them.
    seconds: after which no further pair of a case begins.
    warmups: calls of each side before, beside the first.
    rep_seconds: short calls are repeated for so long.
    limit: cores that others may take of a repetition that counts.
  """

  pairs: int = 9
  max_pairs: int = 18
  seconds: float = 150.0
  warmups: int = 1
  rep_seconds: float = 0.25
  limit: float = statistics.MAX_DISTURBANCE


class Comparison(NamedTuple):
  """One case, measured.

  Attributes:
    errors: of the outputs, by name: |ours - theirs| / |theirs|.
    reps: of all pairs, (ours, theirs).
  """

  summary: statistics.Summary
  errors: Mapping[str, float]
  prepared: Mapping[str, sides.Prepared]
  memory: Mapping[str, Mapping[str, int]]
  reps: list[statistics.Pair]


def compare(
  name: str,
  ours: sides.Side,
  theirs: sides.Side,
  *,
  tolerance: float,
  budget: Budget,
) -> Comparison:
  """Measures a case of both sides.

  Raises:
    AssertionError: they do not compute the same.
  """
  prepared = {"ours": ours.prepare(name), "theirs": theirs.prepare(name)}
  errors = check_parity(
    name, *(p.outputs for p in prepared.values()), tolerance=tolerance
  )
  calls = []
  for side in (ours, theirs):
    for _ in range(budget.warmups):
      seconds = side.measure(1).wall
    calls.append(clocks.calls_for(seconds, budget.rep_seconds))
  pairs = _alternate(ours, theirs, calls, budget)
  return Comparison(
    statistics.summarise(pairs, limit=budget.limit),
    errors,
    prepared,
    {"ours": ours.memory(), "theirs": theirs.memory()},
    pairs,
  )


def alone(
  name: str, side: sides.Side, budget: Budget
) -> tuple[float, sides.Prepared, Mapping[str, int]]:
  """Measures a case of one side; returns its median seconds a call."""
  prepared = side.prepare(name)
  seconds = side.measure(1).wall
  calls = clocks.calls_for(seconds, budget.rep_seconds)
  started, walls = time.monotonic(), []
  while not walls or (
    len(walls) < budget.pairs and time.monotonic() - started < budget.seconds
  ):
    walls.append(side.measure(calls).wall)
  return float(np.median(walls)), prepared, side.memory()


def check_parity(
  name: str,
  ours: Mapping[str, np.ndarray],
  theirs: Mapping[str, np.ndarray],
  *,
  tolerance: float,
) -> dict[str, float]:
  """Returns the relative errors of the outputs.

  Raises:
    AssertionError: an output is missing, has another shape, or differs.
  """
  if set(ours) != set(theirs):
    raise AssertionError(f"{name}: outputs {set(ours)} and {set(theirs)}.")
  errors = {}
  for key, expected in theirs.items():
    found = np.asarray(ours[key], np.float64)
    expected = np.asarray(expected, np.float64)
    if found.shape != expected.shape:
      raise AssertionError(
        f"{name}: {key} has shape {found.shape}, not {expected.shape}."
      )
    scale = np.linalg.norm(expected)
    errors[key] = float(np.linalg.norm(found - expected) / scale)
    # A NaN is no parity either.
    if not errors[key] <= tolerance:
      raise AssertionError(
        f"{name}: {key} differs by {errors[key]:.1e}, more than "
        f"{tolerance:.0e}: nothing was timed."
      )
  return errors


def _alternate(ours, theirs, calls, budget: Budget) -> list[statistics.Pair]:
  pairs: list[statistics.Pair] = []
  started, clean = time.monotonic(), 0
  while not pairs or (
    clean < budget.pairs
    and len(pairs) < budget.max_pairs
    and time.monotonic() - started < budget.seconds
  ):
    pairs.append(
      statistics.Pair(ours.measure(calls[0]), theirs.measure(calls[1]))
    )
    clean += pairs[-1].is_clean(budget.limit)
  return pairs


def measure(
  name: str,
  ours: sides.Side,
  theirs: sides.Side | None,
  *,
  tolerance: float,
  budget: Budget,
) -> dict[str, Any]:
  """Compares a case, or measures our side alone; as JSON can hold it."""
  if theirs is not None:
    return record(
      compare(name, ours, theirs, tolerance=tolerance, budget=budget)
    )
  seconds, prepared, memory = alone(name, ours, budget)
  return {
    "ours": seconds,
    "first_seconds": {"ours": prepared.first_seconds},
    "memory": {"ours": dict(memory)},
  }


def record(comparison: Comparison) -> dict[str, Any]:
  """Returns a comparison as JSON can hold it, outputs left out."""
  summary = comparison.summary
  return {
    **summary._asdict(),
    "ratio": summary.ratio._asdict(),
    "cpu_ratio": summary.cpu_ratio._asdict(),
    "errors": dict(comparison.errors),
    "build_seconds": {
      side: p.build_seconds for side, p in comparison.prepared.items()
    },
    "first_seconds": {
      side: p.first_seconds for side, p in comparison.prepared.items()
    },
    "memory": {side: dict(m) for side, m in comparison.memory.items()},
    "reps": [[rep._asdict() for rep in pair] for pair in comparison.reps],
  }
