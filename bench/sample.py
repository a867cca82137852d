"""Times sampling, stage by stage and end to end, against PyTorch diffusers.

python -m bench.sample                        # CPU, float32: 15 minutes
python -m bench.sample --size=full            # one GPU, bfloat16
python -m bench.sample --size=full --against=compile --only=pipeline_1024

Both sides have the same random weights, written by diffusers and read by our
converter, and must compute the same before anything is timed. Their calls
alternate; those that others disturbed are left out.
"""

import argparse
import os
import sys
import tempfile
from typing import Any

import jax

from bench import jax_sampling, options, workloads
from bench.harness import ceilings, paired, records, sides, tables

NAME = "bench.sample"


def main(argv: list[str]) -> int:
  args = _parse(argv)
  options.set_device(args.device)
  on_cpu = jax.default_backend() == "cpu"
  args.size = args.size or ("small" if on_cpu else "full")
  args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
  size = workloads.SIZES[args.size]
  try:
    names = options.choose(args.only, size.workloads)
    sides.require_torch()
  except (ValueError, ModuleNotFoundError) as error:
    sys.stderr.write(f"{NAME}: {error}\n")
    return 1
  found = {
    "kind": NAME,
    "environment": records.environment(NAME, argv),
    "options": vars(args),
    "ceilings": ceilings.measure(
      args.dtype, **options.ceiling_sizes(args.size)
    )._asdict(),
    "rows": {},
  }
  with tempfile.TemporaryDirectory() as temporary:
    directory = args.checkpoints or temporary
    theirs = sides.RemoteSide(
      "bench.torch_sampling",
      {
        "size": args.size,
        "directory": directory,
        "dtype": args.dtype,
        "device": "cpu" if on_cpu else "cuda",
        "threads": len(os.sched_getaffinity(0)),
        "compiled": args.against == "compile",
      },
    )
    ours = jax_sampling.make_side(args.size, directory, dtype=args.dtype)
    for name in names:
      found["rows"][name] = _measure(name, size, ours, theirs, args)
      records.write(args.json, found) if args.json else None
      records.show(line(name, found))
    theirs.close()
  records.show("\n" + table(found))
  return 0


def _measure(
  name: str,
  size: workloads.Size,
  ours: sides.Side,
  theirs: sides.Side,
  args: argparse.Namespace,
) -> dict[str, Any]:
  workload = size.workloads[name]
  described = {
    "workload": workload._asdict(),
    "flops": workloads.work(size.checkpoints[workload.checkpoint](), workload),
  }
  return described | paired.measure(
    name,
    ours,
    None if args.against == "none" else theirs,
    tolerance=_tolerance(workload, args),
    budget=options.budget(args),
  )


def _tolerance(workload: workloads.Workload, args) -> float:
  # Weights written in bfloat16 and computed in float32 are compared as such.
  if args.dtype == "bfloat16":
    return max(workload.tolerance, 2e-2)
  return workload.tolerance


_HEADER = (
  *("what", "model", "pixels", "batch", "ours", "PyTorch"),
  *("ratio (90 %)", "CPU-time ratio", "goal", "kept", "error"),
  *("at best", "of the ceiling"),
)


def table(found: dict[str, Any]) -> str:
  """Writes a record as a table."""
  return tables.markdown(
    _HEADER, [_cells(name, found) for name in found["rows"]]
  )


def line(name: str, found: dict[str, Any]) -> str:
  """Writes one row for reading while others are measured."""
  cells = _cells(name, found)
  return "  ".join(f"{h} {c}" for h, c in zip(_HEADER, cells, strict=True))


def _cells(name: str, found: dict[str, Any]) -> tuple[Any, ...]:
  row = found["rows"][name]
  workload, ceiling = row["workload"], found["ceilings"]
  best = row["flops"] / ceiling["flops"] if row["flops"] else None
  compared = ("-",) * 3 + ("-", "-")
  if "ratio" in row:
    basis = "" if row["basis"] == "wall" else " by CPU time"
    compared = (
      tables.seconds(row["theirs"]),
      tables.ratio(row["ratio"]) + basis,
      tables.ratio(row["cpu_ratio"]),
      f"{row['kept']}/{row['pairs']}",
      f"{max(row['errors'].values(), default=float('nan')):.0e}",
    )
  theirs, ratio, cpu_ratio, kept, error = compared
  return (
    name,
    workload["checkpoint"],
    workload["pixels"],
    workload["batch"],
    tables.seconds(row["ours"]),
    theirs,
    ratio,
    cpu_ratio,
    _goal(workload),
    kept,
    error,
    tables.seconds(best),
    tables.share(best, row["ours"]),
  )


def _goal(workload: dict[str, Any]) -> str:
  goals = []
  if workload["goal"] is not None:
    goals.append(f"{workload['goal']:.2f}")
  if workload["seconds"] is not None:
    goals.append(f"{tables.seconds(workload['seconds'])} (H200)")
  return ", ".join(goals) or "-"


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--size", choices=list(workloads.SIZES), help="default: by device")
  options.add_common(parser)
  add("--dtype", choices=["float32", "bfloat16"], help="default: by device")
  add("--checkpoints", help="directory to keep the random weights in")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
