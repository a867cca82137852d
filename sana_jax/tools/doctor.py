"""Says what is wrong with a data set: python -m sana_jax.tools.doctor PATH.

PATH is whatever sana_jax.data.sources.open_source opens. Every picture is
decoded and every caption counted; nothing is changed. The exit code is 0 for a
healthy data set, 1 when problems were found, and 2 when it cannot be used.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sana_jax import resolution
from sana_jax.data import sources
from sana_jax.tools import contact_sheet, diagnosis

_SHOWN = 10
_SIZES = tuple(resolution.COMPRESSION * s for s in resolution.SAMPLE_SIZES)


def lines(report: Mapping[str, Any]) -> Iterator[str]:
  """Yields a report as text for people."""
  yield f"{report['source']}: {report['records']:,} records"
  yield f"tokenizer: {report['tokenizer']}"
  for code, entry in report["findings"].items():
    yield f"{entry['level']}: {entry['count']:,} {entry['meaning']} ({code})"
    for item in entry["items"][:_SHOWN]:
      yield f"  {item['key']}: {item['detail']}"
    if entry["count"] > _SHOWN:
      yield f"  and {entry['count'] - _SHOWN:,} more"
  yield "sides of pictures, shorter, in pixels"
  for name, count in report["resolutions"].items():
    yield f"  {name:>12} {count:>8,}"
  yield "height / width"
  for name, count in report["aspects"].items():
    yield f"  {name:>12} {count:>8,}"
  yield (
    f"buckets of image_size {report['image_size']}, full batches of "
    f"{report['batch_size']} per epoch, lost to cropping"
  )
  for bucket in report["buckets"]:
    yield (
      f"  {bucket['height']:>5} x {bucket['width']:<5} {bucket['count']:>8,} "
      f"{bucket['batches']:>6,} {bucket['cropped']:>6.1%}"
    )
  yield f"  {report['leftover']:,} pictures fill no batch"
  yield "healthy" if report["healthy"] else "problems found"


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's arguments."""
  parser = argparse.ArgumentParser(
    prog="python -m sana_jax.tools.doctor",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("path")
  parser.add_argument(
    "--kind", default="auto", choices=("auto", *sources.KINDS)
  )
  parser.add_argument("--split", help="of the data set")
  parser.add_argument(
    "--image_size", type=int, default=1024, choices=_SIZES, help="of the bins"
  )
  parser.add_argument("--batch_size", type=int, default=64)
  parser.add_argument(
    "--tokenizer",
    help="directory; default: the bundled one, which is not Gemma",
  )
  parser.add_argument(
    "--max_tokens", type=int, default=300, help="that a caption may have"
  )
  parser.add_argument("--threads", type=int, default=8)
  parser.add_argument(
    "--report", help="directory for report.json and contact_sheet.html"
  )
  parser.add_argument("--json", action="store_true", help="for machines")
  return parser


def main(argv: Sequence[str]) -> int:
  parser = make_parser()
  args = parser.parse_args(argv)
  for name in ("batch_size", "max_tokens", "threads"):
    if vars(args)[name] < 1:
      parser.error(f"--{name} must be at least 1, got {vars(args)[name]}")
  try:
    source = sources.open_source(args.path, kind=args.kind, split=args.split)
    settings = diagnosis.Settings.load(
      args.image_size, args.batch_size, args.tokenizer, args.max_tokens
    )
  except (OSError, ValueError) as error:
    sys.stderr.write(f"doctor: {error}\n")
    return 2
  examined = diagnosis.examine_all(source, settings, args.threads)
  report = diagnosis.summarize(source, examined, settings)
  if args.report:
    directory = pathlib.Path(args.report)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(
      json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    page = contact_sheet.page(source, examined, report)
    (directory / "contact_sheet.html").write_text(page, encoding="utf-8")
  if args.json:
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
  else:
    sys.stdout.write("\n".join(lines(report)) + "\n")
  if not report["usable"]:
    sys.stderr.write(f"doctor: no picture of {source.name} can be decoded.\n")
    return 2
  return 0 if report["healthy"] else 1


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
