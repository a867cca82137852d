"""Says what a checkpoint is: python -m sana_jax.tools.inspect PATH.

PATH is a pipeline directory, a component (a directory, or a .safetensors or
.pth file, in any layout), a work directory of train.py, or a LoRA file. Only
headers are read. The exit code is 1 when tensors are missing, unexpected or
misshapen, and 2 when PATH cannot be read.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sana_jax.tools import recognition

_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def lines(report: Mapping[str, Any], indent: str = "") -> Iterator[str]:
  """Yields a report as text for people, a fact a line."""
  width = max(map(len, report), default=0)
  for name, value in report.items():
    label = f"{indent}{name.replace('_', ' '):<{width}}  "
    if name == "components":
      for part, contents in value.items():
        yield f"{indent}{part}"
        yield from lines(contents, indent + "  ")
    elif name in ("problems", "ignored") and value:
      yield f"{indent}{name}"
      yield from (f"{indent}  {item}" for item in value)
    else:
      yield f"{label}{_text(name, value)}"


def _text(name: str, value: Any) -> str:
  if name == "dtypes":
    return "; ".join(
      f"{dtype}: {count['tensors']:,} tensors, {_size(count['bytes'])}"
      for dtype, count in value.items()
    )
  if isinstance(value, Mapping):
    return ", ".join(f"{k} {_text(k, v)}" for k, v in value.items())
  if isinstance(value, list | tuple):
    return ", ".join(str(item) for item in value) or "none"
  if isinstance(value, bool):
    return "yes" if value else "no"
  if value is None:
    return "not a published one" if name == "architecture" else "none"
  if name.endswith("bytes"):
    return _size(value)
  return f"{value:,}" if isinstance(value, int) else str(value)


def _size(count: float) -> str:
  for unit in _BYTE_UNITS[:-1]:
    if count < 1000:
      return f"{count:.3g} {unit}"
    count /= 1000
  return f"{count:.3g} {_BYTE_UNITS[-1]}"


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's arguments."""
  parser = argparse.ArgumentParser(
    prog="python -m sana_jax.tools.inspect",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("path")
  parser.add_argument("--variant", help="of the weights, e.g. fp16")
  parser.add_argument(
    "--config", help="config.json of a component that has none beside it"
  )
  parser.add_argument("--json", action="store_true", help="for machines")
  return parser


def main(argv: Sequence[str]) -> int:
  args = make_parser().parse_args(argv)
  try:
    report = recognition.describe(
      args.path, variant=args.variant, config_file=args.config
    )
  except (OSError, ValueError) as error:
    sys.stderr.write(f"inspect: {error}\n")
    return 2
  if args.json:
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
  else:
    sys.stdout.write("\n".join(lines(report)) + "\n")
  return 1 if recognition.problems(report) else 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
