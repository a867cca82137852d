"""Compares the memory a pipeline is predicted to need with what XLA allocates.

python -m bench.memory --config=sana_1600m_4k --topology=v5e:2x2

Compiles the stages ahead of time for one chip of a TPU that need not be there;
`pip install "jax[tpu]"` brings the compiler. Parameters are abstract: nothing
of full size is made. A decoder may take minutes to compile.
"""

import argparse
import json
import sys
from typing import Any

import jax.numpy as jnp
from etils import epath

from sana_jax import config as config_lib
from sana_jax import hardware
from sana_jax.models import tiling as tiling_lib
from sana_jax.models import windows as windows_lib
from sana_jax.pipeline import footprint, memory
from sana_jax.plan import programs, sampling, topology

_CONFIGS = {
  function.__name__: function
  for function in (
    config_lib.sana_600m,
    config_lib.sana_1600m,
    config_lib.sana_1600m_2k,
    config_lib.sana_1600m_4k,
    config_lib.sana15_1600m,
    config_lib.sana15_4800m,
  )
}
_GIB = 2**30


def main(argv: list[str]) -> int:
  args = _parse(argv)
  mesh = topology.one_chip(args.topology)
  chip = args.topology.partition(":")[0]
  available = hardware.CHIPS[chip].hbm_bytes
  configs = (
    config_lib.Gemma2Config(),
    _CONFIGS[args.config](),
    config_lib.DCAEConfig(),
  )
  models = programs.abstract_models(configs, jnp.dtype(args.dtype))
  parts = map(footprint.make_part, configs, models)
  sizes = footprint.Models(*parts, platform=topology.platform_of(chip))
  work = programs.make_work(
    configs[1],
    configs[2],
    height=args.height,
    width=args.width,
    batch=args.batch_size,
    guided=args.guidance,
    token_length=args.token_length,
  )
  plan = memory.plan(
    sizes,
    work,
    policy=memory.Policy(),
    tiling=_cut(args),
    available=available,
  )
  _print(f"{args.config}, {args.dtype}, {args.topology}: {plan.reason}")
  records = []
  for program in programs.programs(
    configs, models, work, plan.decoding, args.steps
  ):
    if program.stage in (args.stage or memory.STAGES):
      records.append(sampling.measure(program, mesh, plan, available))
      _print(describe(records[-1]))
  if args.output:
    epath.Path(args.output).write_text(
      json.dumps({"plan": plan.reason, "programs": records}, indent=1)
    )
  return 0


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  add = parser.add_argument
  add("--config", default="sana_1600m_4k", choices=list(_CONFIGS))
  add("--height", type=int, help="pixels; default: as trained")
  add("--width", type=int, help="pixels; default: as trained")
  add("--batch_size", type=int, default=1, help="images")
  add("--steps", type=int, default=20, help="of the sampler")
  add("--guidance", action=argparse.BooleanOptionalAction, default=True)
  add("--token_length", type=int, default=510, help="of prompt, instruction")
  add("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
  cuts = parser.add_mutually_exclusive_group()
  cuts.add_argument("--vae_tile", type=int, help="default: as planned")
  cuts.add_argument("--vae_window", type=int, help="default: as planned")
  add("--topology", default="v5e:2x2", help="one chip of it is used")
  add("--stage", action="append", choices=memory.STAGES, help="default: all")
  add("--output", help="JSON file of the figures")
  return parser.parse_args(argv)


def _cut(args: argparse.Namespace) -> memory.Cut | None:
  if args.vae_tile:
    return tiling_lib.square(args.vae_tile)
  if args.vae_window:
    return windows_lib.Windows(window_side=args.vae_window)
  return None


def describe(record: dict[str, Any]) -> str:
  gib = {
    name: f"{value / _GIB:.2f}"
    for name, value in record.items()
    if isinstance(value, int)
  }
  return (
    f"{record['stage']:13} {record['program']:24} weights {gib['weights']} + "
    f"working {gib['working']} (inputs {gib['inputs']}, temporaries "
    f"{gib['temporaries']}, outputs {gib['outputs']}, code {gib['code']}; "
    f"predicted {gib['predicted']}) = {gib['total']} GiB, fits: "
    f"{'yes' if record['fits'] else 'NO'}, compiled in "
    f"{record['compile_seconds']} s"
  )


def _print(line: str) -> None:
  sys.stdout.write(line + "\n")
  sys.stdout.flush()


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
