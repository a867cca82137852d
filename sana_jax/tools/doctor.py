"""Says what is wrong with a data set: python -m sana_jax.tools.doctor PATH.

PATH is whatever sana_jax.data.sources.open_source opens. Every picture is
decoded and every caption counted; nothing is changed. Pass the sizes, buckets
and lengths of the run that it is for: what fits one may be too small for
another. --config=configs/x.py takes them from a config of train.py, and flags
win over it. The exit code is 0 for a healthy data set, 1 when problems were
found, and 2 when it could not be examined, or nothing of it can be used.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sana_jax import resolution
from sana_jax.data import sources, storage
from sana_jax.data.sources import access
from sana_jax.tools import contact_sheet, diagnosis, run_settings

_SHOWN = 10
_REPORT, _SHEET = "report.json", "contact_sheet.html"
_POSITIVE = (
  *("image_size", "multiple", "max_buckets", "batch_size"),
  *("max_sequence_length", "threads"),
)


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
    f"buckets of image_size {report['image_size']}, of sides that are "
    f"multiples of {report['multiple']}: pictures, batches of "
    f"{report['batch_size']} per epoch, lost to cropping"
  )
  if report["config"] is None:
    yield (
      "  (multiples: of the model's pixels per token, 32 for published ones; "
      "--config=FILE takes what a run has)"
    )
  for bucket in report["buckets"]:
    yield (
      f"  {bucket['height']:>5} x {bucket['width']:<5} {bucket['count']:>8,} "
      f"{bucket['batches']:>8,.2f} {bucket['cropped']:>6.1%}"
    )
  yield (
    f"  {report['batches_per_epoch']:,.2f} batches per epoch; what fills none "
    "waits for the next epoch"
  )
  if report["moved"]:
    yield f"  {report['moved']:,} pictures moved to a kept shape"
  yield from report["advice"]
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
    "--config",
    help="file of train.py, which gives the defaults of --image_size, "
    "--buckets, --max_buckets, --multiple, --batch_size, "
    "--max_sequence_length, --min_clip_score and --tokenizer",
  )
  parser.add_argument(
    "--image_size",
    type=int,
    default=1024,
    help="side of a square picture in training, in pixels",
  )
  parser.add_argument(
    "--buckets",
    choices=("square", "aspect"),
    default="aspect",
    help="as data.buckets of training and --buckets of precompute",
  )
  parser.add_argument("--max_buckets", type=int, default=10)
  parser.add_argument(
    "--multiple",
    type=int,
    default=resolution.COMPRESSION,
    help="of which sides are multiples: pixels per token of the model",
  )
  parser.add_argument(
    "--batch_size", type=int, default=64, help="of all hosts together"
  )
  parser.add_argument(
    "--tokenizer",
    help="directory; default: the bundled one, which is not Gemma",
  )
  parser.add_argument(
    "--max_sequence_length",
    type=int,
    default=300,
    help="tokens that a caption may have",
  )
  parser.add_argument(
    "--min_clip_score",
    type=float,
    default=0.0,
    help="pictures whose prompt has a lower score are left out, as by "
    "data.min_clip_score of training and --min_clip_score of precompute",
  )
  parser.add_argument("--threads", type=int, default=8)
  parser.add_argument(
    "--report",
    help="directory, local or in any store, for report.json and "
    "contact_sheet.html",
  )
  parser.add_argument("--json", action="store_true", help="for machines")
  return parser


def main(argv: Sequence[str]) -> int:
  try:
    return _examine(_parse(argv))
  except (OSError, ValueError) as error:
    sys.stderr.write(f"doctor: {error}\n")
    return 2


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses the flags, with a config's values where they are not given."""
  parser = make_parser()
  args = parser.parse_args(argv)
  if args.config is not None:
    parser.set_defaults(**run_settings.of_config(args.config))
    args = parser.parse_args(argv)
  for name in _POSITIVE:
    if vars(args)[name] < 1:
      parser.error(f"--{name} must be at least 1, got {vars(args)[name]}")
  if not 0 <= args.min_clip_score < math.inf:
    parser.error(
      f"--min_clip_score must be at least 0, got {args.min_clip_score}"
    )
  if args.image_size % args.multiple:
    parser.error(
      f"--image_size must be a multiple of --multiple={args.multiple}, got "
      f"{args.image_size}"
    )
  return args


def _examine(args: argparse.Namespace) -> int:
  source = sources.open_source(args.path, kind=args.kind, split=args.split)
  settings = diagnosis.Settings.load(
    image_size=args.image_size,
    kind=args.buckets,
    multiple=args.multiple,
    max_buckets=args.max_buckets,
    batch_size=args.batch_size,
    tokenizer=args.tokenizer,
    max_tokens=args.max_sequence_length,
    min_clip_score=args.min_clip_score,
  )
  directory = _report_directory(args, source) if args.report else None
  examined = diagnosis.examine_all(source, settings, args.threads)
  found = diagnosis.sort(source.name, examined, settings)
  report = diagnosis.summarize(source, examined, found, settings)
  report["config"] = args.config
  if directory is not None:
    content = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    (directory / _REPORT).write(content.encode())
    page = contact_sheet.page(source, examined, report)
    (directory / _SHEET).write(page.encode())
  if args.json:
    sys.stdout.write(json.dumps(report, indent=2) + "\n")
  else:
    sys.stdout.write("\n".join(lines(report)) + "\n")
  if not report["usable"]:
    sys.stderr.write(f"doctor: no picture of {source.name} can be used.\n")
    return 2
  return 0 if report["healthy"] else 1


def _report_directory(
  args: argparse.Namespace, source: access.FileSource
) -> storage.Location:
  """Returns where the report goes, before anything is examined.

  Raises:
    OSError: it cannot be written there.
    ValueError: it is within the source, which is to stay as it is.
  """
  directory = storage.Location.of(args.report)
  root = storage.Location.of(args.path)
  if root.is_dir() and directory.is_within(root):
    raise ValueError(
      f"--report={args.report} is within {source.name}, where its files would "
      "belong to the data: take another directory."
    )
  (directory / _REPORT).write(b"{}\n")
  return directory


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
