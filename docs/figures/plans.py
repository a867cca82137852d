"""Memory and traffic of compiled training steps, from the records of plans."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from docs.figures import style

RECORDS = pathlib.Path(__file__).parents[1] / "plan"
STEPS = {
  "1600m_v5e_16x16": "1.6B, 256 v5e",
  "1600m_v5e_16x16_fsdp64": "1.6B, 256 v5e",
  "1600m_h100_8": "1.6B, 8 H100",
  "4800m_v5e_8x8": "4.8B, 64 v5e",
  "4800m_v5p_4x4x4": "4.8B, 64 v5p",
}
_NAMED = ("parameters", "average", "optimiser", "temporaries")
_KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def draw(directory: pathlib.Path) -> None:
  """Draws parts of a device's memory, and what it sends, by kind."""
  records = [json.loads((RECORDS / f"{n}.json").read_text()) for n in STEPS]
  made, (left, right) = style.figure(9, 3, columns=2)
  memory = {name: _part("memory_bytes", name.__eq__) for name in _NAMED}
  memory["other"] = _part("memory_bytes", lambda name: name not in _NAMED)
  _stack(left, records, memory, 2**30)
  left.set(xlabel="GiB on a device", title="memory of a training step")
  sent = {
    kind: _part("sent_bytes", lambda name, kind=kind: name.endswith(kind))
    for kind in _KINDS
  }
  sent["other"] = _part("sent_bytes", lambda name: not name.endswith(_KINDS))
  _stack(right, records, sent, 1e9)
  right.set(xlabel="GB a step", title="sent by a device", yticks=[])
  labels = [
    f"{name}\n{record['settings']['mesh']}"
    for name, record in zip(STEPS.values(), records, strict=True)
  ]
  left.set_yticks(range(len(records)), labels, fontsize=8)
  style.write_svg(made, directory / "plans.svg")


def _part(field: str, belongs: Callable[[str], bool]):
  def size(record: dict[str, Any]) -> float:
    return sum(n for name, n in record[field].items() if belongs(name))

  return size


def _stack(panel, records, parts, unit: float) -> None:
  ends = [0.0] * len(records)
  for name, size in parts.items():
    sizes = [size(record) / unit for record in records]
    panel.barh(range(len(records)), sizes, left=ends, label=name, height=0.6)
    ends = [end + size for end, size in zip(ends, sizes, strict=True)]
  panel.invert_yaxis()
  panel.grid(visible=False, axis="y")
  panel.legend(fontsize=8)
