"""What paired repetitions say: the median of their ratios, and how sure."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bench.harness import clocks

# Cores that others may take during a repetition that counts.
MAX_DISTURBANCE = 0.3
# Fewer undisturbed pairs than this say nothing: processor time must do.
MIN_CLEAN = 3
_LEVEL = 0.90


class Pair(NamedTuple):
  """One repetition of each side, one right after the other."""

  ours: clocks.Rep
  theirs: clocks.Rep

  def is_clean(self, limit: float) -> bool:
    return max(self.ours.disturbance, self.theirs.disturbance) <= limit


class Ratio(NamedTuple):
  """ours / theirs.

  Attributes:
    low: end of the interval that holds 90 % of bootstrapped medians.
  """

  median: float
  low: float
  high: float


class Summary(NamedTuple):
  """What was measured of two sides.

  Attributes:
    ratio: of `basis`, of the pairs that count.
    basis: "wall", of undisturbed pairs; "cpu", of all of them, where too few
      were undisturbed.
    cpu_ratio: of processor time, of all pairs.
    ours: median seconds a call, by `basis`.
    kept: undisturbed pairs.
  """

  ratio: Ratio
  basis: str
  cpu_ratio: Ratio
  ours: float
  theirs: float
  kept: int
  pairs: int
  steal: float
  foreign: float


def summarise(
  pairs: Sequence[Pair], *, limit: float = MAX_DISTURBANCE, seed: int = 0
) -> Summary:
  """Summarises pairs, disturbed ones left out.

  Raises:
    ValueError: there is no pair.
  """
  if not pairs:
    raise ValueError("There is no pair of repetitions to summarise.")
  clean = [pair for pair in pairs if pair.is_clean(limit)]
  basis = "wall" if len(clean) >= min(MIN_CLEAN, len(pairs)) else "cpu"
  counted = clean if basis == "wall" else pairs
  ours, theirs = (
    np.array([getattr(pair[side], basis) for pair in counted])
    for side in (0, 1)
  )
  cpu = (np.array([pair[side].cpu for pair in pairs]) for side in (0, 1))
  reps = [rep for pair in pairs for rep in pair]
  return Summary(
    ratio_of(ours, theirs, seed=seed),
    basis,
    ratio_of(*cpu, seed=seed),
    float(np.median(ours)),
    float(np.median(theirs)),
    len(clean),
    len(pairs),
    float(np.mean([rep.steal for rep in reps])),
    float(np.mean([rep.foreign for rep in reps])),
  )


def ratio_of(
  ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0
) -> Ratio:
  """Returns the median of the paired ratios with a bootstrapped interval."""
  ratios = np.asarray(ours) / np.asarray(theirs)
  rng = np.random.default_rng(seed)
  drawn = rng.choice(ratios, size=(2000, len(ratios)))
  tail = (1 - _LEVEL) / 2
  low, high = np.quantile(np.median(drawn, axis=1), (tail, 1 - tail))
  return Ratio(float(np.median(ratios)), float(low), float(high))
