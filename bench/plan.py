"""Compiles the training steps of docs/plan.md, and writes its table.

python -m bench.plan --output=docs/plan [--row=1600m_v5e_16x16 ...]

Every row is a step of full size for chips that need not be there: minutes each
on a few cores, and a few GiB of memory. Without --row, rows of which --output
has no record yet; `--table` compiles nothing and prints what is there.
"""

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from sana_jax import config as config_lib
from sana_jax.plan import report, topology, training

_GIB = 2**30


class Row(NamedTuple):
  """One step: its model, its chips, and how it is spread over them."""

  model: Callable[[], config_lib.SanaConfig]
  topology: str
  mesh: dict[str, int]
  batch_per_chip: int
  num_slices: int = 1
  optimiser: str = "adamw"


_1600M, _4800M = config_lib.sana_1600m, config_lib.sana15_4800m
ROWS = {
  "1600m_v5e_16x16": Row(_1600M, "v5e:16x16", {"data": 16, "fsdp": 16}, 4),
  "1600m_v5e_16x16_fsdp64": Row(
    _1600M, "v5e:16x16", {"data": 4, "fsdp": 64}, 4
  ),
  "4800m_v5e_8x8": Row(_4800M, "v5e:8x8", {"data": 1, "fsdp": 64}, 8),
  "4800m_v5e_8x8_fsdp16": Row(_4800M, "v5e:8x8", {"data": 4, "fsdp": 16}, 8),
  "4800m_v5p_4x4x4": Row(_4800M, "v5p:4x4x4", {"data": 4, "fsdp": 16}, 16),
  # The same shards, and more copies: a device should send the same.
  "1600m_v5e_4x4": Row(_1600M, "v5e:4x4", {"data": 1, "fsdp": 16}, 4),
  "1600m_v5e_8x8": Row(_1600M, "v5e:8x8", {"data": 4, "fsdp": 16}, 4),
  "1600m_v6e_8x8": Row(_1600M, "v6e:8x8", {"data": 4, "fsdp": 16}, 8),
  "1600m_v5e_8x8_2_slices": Row(
    _1600M, "v5e:8x8", {"data": 8, "fsdp": 16}, 4, num_slices=2
  ),
  "1600m_h100_8": Row(_1600M, "h100:8", {"data": 1, "fsdp": 8}, 16),
  "4800m_h200_1": Row(_4800M, "h200:1", {"data": 1}, 32, optimiser="came_8bit"),
}


def main(argv: list[str]) -> int:
  args = _parse(argv)
  jax.config.update("jax_platforms", "cpu")
  output = epath.Path(args.output)
  output.mkdir(parents=True, exist_ok=True)
  missing = [name for name in ROWS if not _file(output, name).exists()]
  for name in () if args.table else args.row or missing:
    record = _compile(ROWS[name])
    _file(output, name).write_text(json.dumps(record, indent=1) + "\n")
    sys.stderr.write(f"{name}: {record['compile_seconds']} s\n")
  sys.stdout.write(table(output))
  return 0


def table(output: epath.Path) -> str:
  """Returns what records there are as a table in Markdown."""
  lines = [
    "| step | mesh | images a chip | state | in all | of | sent by a chip, GB "
    "| least | ratio | at best, images/s |",
    "|---|---|---|---|---|---|---|---|---|---|",
  ]
  for name, row in ROWS.items():
    path = _file(output, name)
    if path.exists():
      lines.append(_line(row, json.loads(path.read_text())))
  return "\n".join(lines) + "\n"


def _line(row: Row, record: dict[str, Any]) -> str:
  memory = record["memory_bytes"]
  state = (
    sum(memory[name] for name in ("parameters", "optimiser", "average")) / _GIB
    if memory
    else float("nan")
  )
  mesh = " ".join(f"{axis}={n}" for axis, n in row.mesh.items() if n > 1)
  optimiser = "" if row.optimiser == "adamw" else f", {row.optimiser}"
  slices = f"{row.num_slices} x " if row.num_slices > 1 else ""
  sent = sum((record["sent_bytes"] or {}).values()) / 1e9
  cells = (
    f"{row.model.__name__}, {slices}{row.topology}{optimiser}",
    mesh or "one chip",
    row.batch_per_chip,
    f"{state:.2f} GiB",
    f"{record['total_bytes'] / _GIB:.2f} GiB",
    f"{record['hbm_bytes'] / _GIB:.2f}",
    f"{sent:.2f}",
    f"{sum(record['least_bytes'].values()) / 1e9:.2f}",
    f"{record['ratio']:.2f}" if record["ratio"] else "",
    f"{record['prediction']['images_per_second']:.0f}",
  )
  return f"| {' | '.join(map(str, cells))} |"


def _compile(row: Row) -> dict[str, Any]:
  devices = topology.describe(row.topology, num_slices=row.num_slices)
  config = config_lib.TextToImageConfig(
    model=row.model(),
    batch_size=row.batch_per_chip * len(devices.devices),
    mesh=row.mesh,
    remat="full",
  )
  config.optim.name = row.optimiser
  config.data.synthetic = True
  config.freeze()
  plan = training.plan(config, devices)
  sys.stderr.write(report.text(plan) + "\n")
  return report.record(plan)


def _file(output: epath.Path, name: str) -> epath.Path:
  return output / f"{name}.json"


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--output", default="docs/plan", help="directory of the records")
  add(
    "--row", action="append", choices=list(ROWS), help="default: missing ones"
  )
  add("--table", action="store_true", help="only print the table")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
