"""Tables in Markdown, and numbers as people read them."""

import math
from collections.abc import Sequence
from typing import Any


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
  """Writes a table whose columns line up.

  Raises:
    ValueError: a row of another length than the header.
  """
  cells = [[str(cell) for cell in row] for row in (header, *rows)]
  for row in cells:
    if len(row) != len(header):
      raise ValueError(f"row {row} has not the {len(header)} cells of {header}")
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]

  def line(row):
    padded = (c.ljust(w) for c, w in zip(row, widths, strict=True))
    return f"| {' | '.join(padded)} |"

  rule = f"|{'|'.join('-' * (width + 2) for width in widths)}|"
  return "\n".join([line(cells[0]), rule, *map(line, cells[1:])]) + "\n"


def seconds(value: float | None) -> str:
  """Writes a duration: "1.23 s", "45.6 ms", "7.89 us"; None: "-"."""
  return _scaled(value, ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")))


def quantity(value: float | None, unit: str) -> str:
  """Writes "1.23 TFLOP/s", "456 GB" and so on; None: "-"."""
  scales = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
  return _scaled(value, tuple((s, prefix + unit) for s, prefix in scales))


def share(part: float | None, whole: float | None) -> str:
  """Writes part / whole as per cent; of nothing: "-"."""
  return f"{part / whole:.0%}" if part and whole else "-"


def ratio(value: dict[str, float]) -> str:
  """Writes a ratio and its interval."""
  return f"{value['median']:.2f} ({value['low']:.2f}-{value['high']:.2f})"


def _scaled(value, scales) -> str:
  if value is None or math.isnan(value):
    return "-"
  scale, unit = next((s for s in scales if abs(value) >= s[0]), scales[-1])
  return f"{value / scale:.3g} {unit}"
