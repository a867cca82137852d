"""Times a training step against a plain PyTorch loop, and counts its memory.

python -m bench.train                    # CPU, float32: 5 minutes
python -m bench.train --size=full        # one GPU, bfloat16

The step is the one a run compiles: forward and backward, clipping, AdamW, the
average, the check for what is not finite. Latents and text states are in
memory already. Both sides begin with the same parameters, and must agree on
the losses and gradient norms of two steps before anything is timed.
"""

import argparse
import os
import sys
import tempfile
from typing import Any

import jax

from bench import jax_training, options, training_loads
from bench.harness import ceilings, paired, records, sides, tables
from sana_jax import flops

NAME = "bench.train"


def main(argv: list[str]) -> int:
  args = _parse(argv)
  options.set_device(args.device)
  on_cpu = jax.default_backend() == "cpu"
  args.size = args.size or ("small" if on_cpu else "full")
  loads = training_loads.LOADS[args.size]
  try:
    names = options.choose(args.only, loads)
    sides.require_torch()
  except (ValueError, ModuleNotFoundError) as error:
    sys.stderr.write(f"{NAME}: {error}\n")
    return 1
  dtype = loads[names[0]].dtype
  ceiling = ceilings.measure(dtype, **options.ceiling_sizes(args.size))
  found = {
    "kind": NAME,
    "environment": records.environment(NAME, argv),
    "options": vars(args),
    "ceilings": ceiling._asdict(),
    "rows": {},
  }
  with tempfile.TemporaryDirectory() as directory:
    theirs = sides.RemoteSide(
      "bench.torch_training",
      {
        "size": args.size,
        "directory": directory,
        "device": "cpu" if on_cpu else "cuda",
        "threads": len(os.sched_getaffinity(0)),
        "compiled": args.against == "compile",
      },
    )
    ours = jax_training.make_side(args.size, directory)
    for name in names:
      found["rows"][name] = _measure(name, loads[name], ours, theirs, args)
      if args.json:
        records.write(args.json, found)
    theirs.close()
  records.show(table(found))
  return 0


def _measure(
  name: str,
  load: training_loads.Load,
  ours: sides.Side,
  theirs: sides.Side,
  args: argparse.Namespace,
) -> dict[str, Any]:
  values = load._replace(model=load.model.__name__)._asdict()
  described = {
    "load": values,
    # What is computed again is no merit.
    "flops": load.batch
    * flops.training(
      flops.forward(
        load.model(), load.pixels, load.pixels, text_length=load.text_length
      )
    ),
    "memory_by_category": jax_training.memory_by_category(load),
  }
  return described | paired.measure(
    name,
    ours,
    None if args.against == "none" else theirs,
    tolerance=load.tolerance,
    budget=options.budget(args),
  )


def table(found: dict[str, Any]) -> str:
  """Writes a record as two tables: speed, and memory."""
  header = (
    *("step", "batch", "ours", "images/s", "PyTorch", "ratio (90 %)"),
    *("CPU-time ratio", "goal", "kept", "of the ceiling", "MFU"),
  )
  speed = tables.markdown(
    header, [_cells(name, found) for name in found["rows"]]
  )
  categories = list(next(iter(found["rows"].values()))["memory_by_category"])
  memory = tables.markdown(
    ("step", *categories),
    [
      (
        name,
        *(
          tables.quantity(row["memory_by_category"][category], "B")
          for category in categories
        ),
      )
      for name, row in found["rows"].items()
    ],
  )
  return f"{speed}\nMemory of our step, by XLA's account:\n\n{memory}"


def _cells(name: str, found: dict[str, Any]) -> tuple[Any, ...]:
  row, ceiling = found["rows"][name], found["ceilings"]
  load, speed = row["load"], row["flops"] / row["ours"]
  compared = ("-",) * 4
  if "ratio" in row:
    basis = "" if row["basis"] == "wall" else " by CPU time"
    compared = (
      tables.seconds(row["theirs"]),
      tables.ratio(row["ratio"]) + basis,
      tables.ratio(row["cpu_ratio"]),
      f"{row['kept']}/{row['pairs']}",
    )
  theirs, ratio, cpu_ratio, kept = compared
  goal = load["goal"] if load["goal"] else f"MFU {load['mfu'] or 0:.0%}"
  return (
    name,
    load["batch"],
    tables.seconds(row["ours"]),
    f"{load['batch'] / row['ours']:.3g}",
    theirs,
    ratio,
    cpu_ratio,
    goal if load["goal"] or load["mfu"] else "-",
    kept,
    tables.share(speed, ceiling["flops"]),
    tables.share(speed, ceiling["stated_flops"]),
  )


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--size", choices=list(training_loads.LOADS), help="default: by device"
  )
  options.add_common(parser)
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
