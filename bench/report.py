"""Writes docs/benchmarks.md from the records that are kept.

python -m bench.report [--records=docs/bench] [--output=docs/benchmarks.md]
"""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any

from etils import epath

from bench import ops, sample, startup, tpu_aot, train

_INTRODUCTION = """\
# Benchmarks

Written by `python -m bench.report` from the records in `docs/bench/`; each
table has the command that made it.

A comparison runs both sides in turn, PyTorch in a process of its own, with the
same random weights, and asserts first that they compute the same. The ratio is
ours / PyTorch's, the median of pairs, with the interval that holds 90 % of
bootstrapped medians; pairs are left out during which other processes or the
hypervisor took more than 0.3 cores ("kept" says how many were not). Where
fewer than 3 were left, processor time is compared, and the table says so.
"At best" is what the analytic work takes at the ceilings of the device, which
are measured in the same run by a large matrix product and a large copy.

```sh
python -m bench.sample --json=sample.json   # needs PyTorch diffusers
python -m bench.train --json=train.json     # needs PyTorch
python -m bench.ops --json=ops.json
python -m bench.startup --json=startup.json
python -m bench.tpu_aot --output=aot        # needs libtpu, and no TPU
python -m bench.report --records=docs/bench
```

With `--size=full` the first two take published sizes in bfloat16, for a GPU;
none was at hand.
"""
_TITLES = {
  sample.NAME: ("Sampling", sample.table),
  train.NAME: ("Training", train.table),
  ops.NAME: ("Operations", ops.table),
  startup.NAME: ("Start", startup.table),
}
_AOT = """\
## Compiled for TPUs, without one

`python -m bench.tpu_aot` ({versions}; {commits}). Cycles are the
compiler's own estimate, no measurement; FLOP and bytes are its account, "of
the model's" is FLOP against `sana_jax/flops.py`; "at best" is what they take
at the figures of `sana_jax/hardware.py`. Kernels count what the matrix unit
does: the one of linear attention has four heads of 32 side by side on 128
lanes, and two products for one of bfloat16, 16 times its share of the model,
which is 0.2 to 0.4 % of a block.
"""


def main(argv: list[str]) -> int:
  args = _parse(argv)
  directory = epath.Path(args.records)
  if not directory.is_dir():
    sys.stderr.write(f"bench.report: there is no directory {directory}.\n")
    return 1
  epath.Path(args.output).write_text(render(directory))
  return 0


def render(directory: epath.Path) -> str:
  """Writes all records of a directory as one page.

  Raises:
    ValueError: a record of a kind that is not known.
  """
  parts = [_INTRODUCTION]
  found = [
    (path, json.loads(path.read_text()))
    for path in sorted(directory.glob("*.json"))
  ]
  for path, record in found:
    if record.get("kind") not in _TITLES:
      raise ValueError(
        f"{path} is a record of {record.get('kind')!r}; there are "
        f"{sorted(_TITLES)}."
      )
  order = list(_TITLES)
  for _, record in sorted(found, key=lambda f: order.index(f[1]["kind"])):
    parts.append(_section(record))
  compiled = tpu_aot.read(directory / "aot")
  if compiled:
    parts.append(_compiled(compiled))
  return "\n".join(parts)


def _section(record: Mapping[str, Any]) -> str:
  title, table = _TITLES[record["kind"]]
  environment = record["environment"]
  device = environment["device"]
  if environment["platform"] == "cpu":
    device = f"{environment['processor']}, {environment['cores']} cores"
  lines = [f"## {title}: {device}\n", table(record)]
  lines.append(f"`{environment['command']}`")
  lines.append(
    f"{environment['date']}, commit {environment['commit']}, Python "
    f"{environment['python']}, {_versions(environment)}."
  )
  return "\n".join(lines) + "\n"


def _compiled(found: list[dict[str, Any]]) -> str:
  environments = [record["environment"] for record in found]
  commits = dict.fromkeys(each["commit"] for each in environments)
  text = _AOT.format(
    versions="; ".join(dict.fromkeys(map(_versions, environments))),
    commits=f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}",
  )
  return f"{text}\n{tpu_aot.table(found)}"


def _versions(environment: Mapping[str, Any]) -> str:
  return ", ".join(f"{n} {v}" for n, v in environment["versions"].items())


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--records", default="docs/bench", help="directory of the records")
  add("--output", default="docs/benchmarks.md", help="the page")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
