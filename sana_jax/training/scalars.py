"""Numbers that a step tells: plain ones, and means whose parts add up."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Ratio(NamedTuple):
  """A mean, kept as sum and count: over steps, both add up before dividing.

  Of no samples there is no mean: a count of 0 is left out of logs.
  """

  total: Float[Array, ""]
  count: Float[Array, ""]


Scalars = dict[str, Float[Array, ""] | Int[Array, ""] | Ratio]


def to_floats(scalars: Mapping[str, Array | Ratio]) -> dict[str, float]:
  """Fetches the numbers of one step, without the means of no samples."""
  values = {}
  for name, value in scalars.items():
    if not isinstance(value, Ratio):
      values[name] = float(value)
    elif value.count > 0:
      values[name] = float(value.total) / float(value.count)
  return values
