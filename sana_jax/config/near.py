"""Names that are near a misspelt one."""

import difflib
from collections.abc import Iterable

_AT_MOST = 3
# Likeness, from 0 to 1: the least that counts, as in difflib; and that of a
# name with one of its words, such as "ema" of "ema_decay".
_LEAST, _OF_A_WORD = 0.6, 0.8


def find(name: str, names: Iterable[str]) -> list[str]:
  """Returns names that may have been meant, the likeliest first.

  Of names with dots, the last part may be at home elsewhere: "optim.peak_lr"
  is near "peak_lr", and near "lr".
  """
  word = _last(name)

  def likeness(other: str) -> tuple[float, float]:
    last, whole = _last(other), _ratio(name, other)
    part = _OF_A_WORD if word in last.split("_") else 0
    return max(whole, _ratio(word, last), part), whole

  found = [(likeness(other), other) for other in names]
  found = [pair for pair in found if pair[0][0] >= _LEAST]
  # Sorting is stable: of equals, the first in its order.
  found.sort(key=lambda pair: pair[0], reverse=True)
  return [other for _, other in found[:_AT_MOST]]


def question(names: Iterable[str]) -> str:
  """Asks whether one of these was meant; nothing where there are none."""
  quoted = [repr(name) for name in names]
  return f" Did you mean {' or '.join(quoted)}?" if quoted else ""


def _last(name: str) -> str:
  return name.rpartition(".")[2]


def _ratio(a: str, b: str) -> float:
  return difflib.SequenceMatcher(None, a, b).ratio()
