"""Times the start of a fresh process: importing, tracing, compiling.

python -m bench.startup --json=docs/bench/startup_cpu.json

A figure is the median of processes that compile one evaluation of a model of
full depth, with abstract parameters: with an empty cache of compiled programs
(cold), or with what such a one left (warm). Models take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

_BEGAN = time.perf_counter()

import jax  # noqa: E402  What importing takes is measured.
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from bench import options  # noqa: E402
from bench.harness import records, tables  # noqa: E402
from sana_jax import config as config_lib  # noqa: E402
from sana_jax.models import sana  # noqa: E402

_IMPORTED = time.perf_counter()
NAME = "bench.startup"
_CONFIGS = {
  function.__name__: function
  for function in (
    config_lib.sana_600m,
    config_lib.sana_1600m,
    # The same blocks, 20 and 60 of them.
    config_lib.sana15_1600m,
    config_lib.sana15_4800m,
  )
}
_PHASES = ("import", "trace", "compile")


def main(argv: list[str]) -> int:
  args = _parse(argv)
  if args.phase_of:
    sys.stdout.write(json.dumps(phases(args.phase_of, args.pixels)) + "\n")
    return 0
  try:
    options.set_device(None)
    names = options.choose(args.only, _CONFIGS)
  except ValueError as error:
    sys.stderr.write(f"{NAME}: {error}\n")
    return 1
  timed = {(name, start): [] for name in names for start in ("cold", "warm")}
  for name in names * args.repeats:
    with tempfile.TemporaryDirectory() as cache:
      for start in ("cold", "warm"):
        timed[name, start].append(_in_fresh_process(name, args.pixels, cache))
  rows = [
    {"model": name, "start": start}
    | {
      phase: statistics.median(run[phase] for run in runs) for phase in _PHASES
    }
    for (name, start), runs in timed.items()
  ]
  # Last: a process that has found a TPU keeps it from all others.
  found = {
    "kind": NAME,
    "environment": records.environment(NAME, argv),
    "options": vars(args),
    "rows": rows,
  }
  if args.json:
    records.write(args.json, found)
  records.show(table(found))
  return 0


def phases(name: str, pixels: int) -> dict[str, float]:
  """Returns the seconds of each phase, in this process."""
  config = _CONFIGS[name]()
  started = time.perf_counter()
  model = jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0))
  )
  side = pixels // 32
  args = (
    jax.ShapeDtypeStruct((2, side, side, config.in_channels), jnp.float32),
    jax.ShapeDtypeStruct((2,), jnp.float32),
    jax.ShapeDtypeStruct((2, 300, config.caption_channels), jnp.float32),
    jax.ShapeDtypeStruct((2, 300), jnp.bool_),
  )
  lowered = jax.jit(lambda model, *args: model(*args)).lower(model, *args)
  traced = time.perf_counter()
  lowered.compile()
  compiled = time.perf_counter()
  return dict(
    zip(
      _PHASES,
      (_IMPORTED - _BEGAN, traced - started, compiled - traced),
      strict=True,
    )
  )


def _in_fresh_process(name: str, pixels: int, cache: str) -> dict[str, float]:
  environment = os.environ | {
    "JAX_COMPILATION_CACHE_DIR": cache,
    # Unless told so, JAX keeps only programs that took a while.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }
  done = subprocess.run(
    [sys.executable, "-m", NAME, f"--phase_of={name}", f"--pixels={pixels}"],
    env=environment,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  )
  return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, Any]) -> str:
  """Writes a record as a table."""
  return tables.markdown(
    ("model", "start", "import", "trace and lower", "compile"),
    [
      (row["model"], row["start"], *(tables.seconds(row[p]) for p in _PHASES))
      for row in found["rows"]
    ],
  )


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--only", action="append", help="a model; may be repeated")
  add("--pixels", type=int, default=1024)
  add("--repeats", type=int, default=5, help="processes for each figure")
  add("--json", help="file of the record")
  add("--phase_of", choices=list(_CONFIGS), help=argparse.SUPPRESS)
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
