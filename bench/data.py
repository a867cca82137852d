"""Measures how fast pictures are read and fitted, or latents read.

python -m bench.data --path=DIR --image_size=1024 --threads=1,4,16
python -m bench.data --cache=DIR --threads=4 --workers=0,4

Reads batches as training does, in its order, and compares with what training
takes at this size of pictures: `--config` on `--chip` at a utilisation of
`--mfu`, encoders left out. A cache has its own size.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from etils import epath

from sana_jax import config as config_lib
from sana_jax import flops
from sana_jax.data import cache, loader, opening

_CONFIGS = {
  function.__name__: function
  for function in (
    config_lib.sana_600m,
    config_lib.sana_1600m,
    config_lib.sana15_1600m,
    config_lib.sana15_4800m,
  )
}
# Dense bfloat16 operations per second of one chip, as its maker says.
_PEAK = {
  "a100": 312e12,
  "h100": 989e12,
  "h200": 989e12,
  "v5e": 197e12,
  "v5p": 459e12,
  "v6e": 918e12,
}
_COMPRESSION = 32


class Speed(NamedTuple):
  """How fast one way of reading was.

  Attributes:
    first_seconds: until the first batch.
    images_per_second: afterwards.
    megabytes_per_second: of arrays, afterwards.
  """

  num_threads: int
  num_workers: int
  first_seconds: float
  images_per_second: float
  megabytes_per_second: float


def main(argv: list[str]) -> int:
  args = _parse(argv)
  # Grain's workers read flags, which nobody else parses here.
  flags.FLAGS.mark_as_parsed()
  try:
    cached = cache.CachedSource(args.cache) if args.cache else None
    _choose_size(args, cached)
    config = _data_config(args)
    config.freeze()
    opened = _open(config, cached, args)
  except (OSError, ValueError) as error:
    sys.stderr.write(f"bench.data: {error}\n")
    return 1
  needed = images_per_second(args)
  _print(
    f"{args.chip} trains {args.config} on {needed:.1f} images/s per chip at "
    f"{args.image_size} pixels, {args.mfu:.0%} of its peak"
  )
  _print("threads workers   first s  images/s      MB/s  chips fed")
  speeds = []
  for workers in args.workers:
    for threads in args.threads:
      host = loader.Host(num_threads=threads, num_workers=workers)
      speed = measure(opened.batches, host, args.batch_size, args.seconds)
      speeds.append(speed)
      _print(
        f"{threads:7d} {workers:7d} {speed.first_seconds:9.2f} "
        f"{speed.images_per_second:9.1f} {speed.megabytes_per_second:9.1f} "
        f"{speed.images_per_second / needed:10.2f}"
      )
  if args.json:
    epath.Path(args.json).write_text(
      json.dumps(record(args, needed, speeds), indent=1)
    )
  return 0


def measure(
  batches: loader.HostBatches,
  host: loader.Host,
  batch_size: int,
  seconds: float,
) -> Speed:
  """Reads batches for some seconds, at least two."""
  started = time.monotonic()
  found: Iterator[loader.Batch] = iter(batches(host, 0))
  size = _bytes(next(found))
  first = time.monotonic()
  count, total = 0, 0
  while count == 0 or time.monotonic() - first < seconds:
    size = _bytes(next(found))
    count, total = count + 1, total + size
  elapsed = time.monotonic() - first
  return Speed(
    host.num_threads,
    host.num_workers,
    first - started,
    count * batch_size / elapsed,
    total / elapsed / 1e6,
  )


def images_per_second(args: argparse.Namespace) -> float:
  """Returns how many images one chip trains on in a second."""
  forward = flops.forward(
    _CONFIGS[args.config](), args.image_size, args.image_size
  )
  return args.mfu * _PEAK[args.chip] / flops.training(forward, remat=args.remat)


def record(
  args: argparse.Namespace, needed: float, speeds: list[Speed]
) -> dict[str, Any]:
  """Returns what was measured, on what, and of which version."""
  return {
    "options": vars(args),
    "machine": {
      "processor": platform.processor() or platform.machine(),
      "cores": os.cpu_count(),
      "python": platform.python_version(),
    },
    "commit": _commit(),
    "images_per_second_needed": needed,
    "speeds": [speed._asdict() for speed in speeds],
  }


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  where = parser.add_mutually_exclusive_group(required=True)
  where.add_argument("--path", help="pictures")
  where.add_argument("--cache", help="of python -m sana_jax.precompute")
  add("--kind", default="auto", help="of the pictures' files")
  add("--split", help="of the pictures, where there are any")
  add("--image_size", type=int, help="pixels; default: the cache's, or 1024")
  add("--buckets", choices=["square", "aspect"], default="aspect")
  add("--max_buckets", type=int, default=10)
  add("--batch_size", type=int, default=32, help="of this host")
  add("--threads", type=_numbers, default=[4], help="such as 1,4,16")
  add("--workers", type=_numbers, default=[0], help="processes: 0,4")
  add("--seconds", type=float, default=10.0, help="for each combination")
  add("--config", choices=list(_CONFIGS), default="sana_1600m")
  add("--chip", choices=list(_PEAK), default="h100")
  add("--mfu", type=float, default=0.4, help="share of the chip's peak")
  add("--remat", choices=["none", "full"], default="full")
  add("--json", help="file of the figures")
  return parser.parse_args(argv)


def _choose_size(
  args: argparse.Namespace, cached: cache.CachedSource | None
) -> None:
  """Sets the size of pictures, where it was left open.

  Raises:
    ValueError: a cache has another size.
  """
  if cached is None:
    args.image_size = args.image_size or 1024
    return
  made = cached.manifest.settings.image_size
  if args.image_size not in (None, made):
    raise ValueError(
      f"--image_size is {args.image_size}, but {args.cache} was made at {made} "
      "pixels: leave it out, or make a cache of that size."
    )
  args.image_size = made


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(",")]


def _data_config(args: argparse.Namespace) -> config_lib.DataConfig:
  values = {"image_size": args.image_size, "max_buckets": args.max_buckets}
  if args.cache:
    return config_lib.DataConfig(cache=args.cache, **values)
  source = config_lib.SourceConfig(
    path=args.path, kind=args.kind, split=args.split
  )
  return config_lib.DataConfig(
    sources=(source,),
    buckets=args.buckets,
    num_threads=max(args.threads),
    **values,
  )


def _open(
  config: config_lib.DataConfig,
  cached: cache.CachedSource | None,
  args: argparse.Namespace,
) -> opening.Opened:
  options = {"batch_size": args.batch_size, "seed": 0}
  if cached is not None:
    return opening.open_cache(cached, config, **options)
  return opening.open_pictures(
    config, multiple=_COMPRESSION, tokenize=_no_tokens, **options
  )


def _no_tokens(texts) -> loader.Batch:
  """Leaves captions out: pictures are what takes time."""
  del texts
  return {}


def _bytes(batch: loader.Batch) -> int:
  return sum(np.asarray(array).nbytes for array in batch.values())


def _commit() -> str | None:
  found = subprocess.run(
    ["git", "rev-parse", "HEAD"],
    cwd=os.path.dirname(__file__),
    capture_output=True,
    text=True,
    check=False,
  )
  return found.stdout.strip() or None


def _print(line: str) -> None:
  sys.stdout.write(line + "\n")
  sys.stdout.flush()


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
