"""Compiles operations and steps for TPUs that need not be there.

python -m bench.tpu_aot --output=docs/bench/aot [--row=block_1600m_1024 ...]

Needs `pip install "jax[tpu]"`, and no TPU. Without --row, rows of which
--output has no record yet; `--table` compiles nothing. Cycles are those that
the compiler plans with, an estimate of its own, and no measurement; those of a
Pallas kernel are what the kernel says of itself.
"""

import argparse
import dataclasses
import json
import re
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from bench import workloads
from bench.harness import records, tables
from sana_jax import config as config_lib
from sana_jax import flops, hardware
from sana_jax.models import dc_ae, sana
from sana_jax.ops import attention, gated_conv, linear_attention
from sana_jax.plan import hlo, topology

NAME = "bench.tpu_aot"
CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_SCOPED = re.compile(r'"memory_space":"1","offset":"\d+","size":"(\d+)"')


class Row(NamedTuple):
  """Something to compile.

  Attributes:
    make: returns a function and its abstract arguments.
    flops: by the analytic model; None: it has no account of it.
  """

  make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
  flops: float | None = None


def _array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype)


def _one_block(config: config_lib.SanaConfig) -> config_lib.SanaConfig:
  return dataclasses.replace(config, num_layers=1)


def _transformer(
  config: config_lib.SanaConfig, pixels: int, batch: int, length: int
):
  """Returns an abstract model of one block, and its arguments."""
  model = jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(
      _one_block(config),
      dtype=jnp.bfloat16,
      param_dtype=jnp.bfloat16,
      rngs=nnx.Rngs(0),
    )
  )
  side = pixels // 32
  return (
    model,
    _array(batch, side, side, config.in_channels, dtype=jnp.float32),
    _array(batch, dtype=jnp.float32),
    _array(batch, length, config.caption_channels),
    _array(batch, length, dtype=jnp.bool_),
  )


def _sample_block(
  config: Callable,
  pixels: int,
  batch: int = 2,
  length: int = workloads.TEXT_LENGTH,
) -> Row:
  def make():
    return (
      lambda model, *args: model(*args),
      _transformer(config(), pixels, batch, length),
    )

  return Row(make, batch * _forward(config(), pixels, length))


def _train_block(config: Callable, pixels: int, batch: int = 2) -> Row:
  def make():
    def step(model, *args):
      return jax.value_and_grad(lambda model: (model(*args) ** 2).mean())(model)

    return step, _transformer(config(), pixels, batch, workloads.TEXT_LENGTH)

  return Row(make, batch * flops.training(_forward(config(), pixels)))


def _forward(
  config: config_lib.SanaConfig,
  pixels: int,
  length: int = workloads.TEXT_LENGTH,
) -> int:
  return flops.forward(_one_block(config), pixels, pixels, text_length=length)


def _decode(pixels: int) -> Row:
  config = config_lib.DCAEConfig()

  def make():
    model = jax.eval_shape(
      lambda: dc_ae.DCAE.from_config(
        config,
        dtype=jnp.bfloat16,
        param_dtype=jnp.bfloat16,
        rngs=nnx.Rngs(0),
      )
    )
    side = pixels // config.spatial_compression
    return dc_ae.DCAE.decode, (model, _array(1, side, side, 32))

  workload = workloads.Workload("decode", "", pixels)
  checkpoint = workloads.Checkpoint(
    config_lib.sana_1600m(), config, config_lib.Gemma2Config()
  )
  return Row(make, workloads.work(checkpoint, workload))


def _op(function: Callable, *shapes: tuple[int, ...], count: float) -> Row:
  return Row(lambda: (function, tuple(_array(*s) for s in shapes)), count)


def _gated_conv(batch: int, side: int, channels: int) -> Row:
  return _op(
    lambda x, kernel, bias: gated_conv.gated_conv((x,), kernel, bias),
    *((batch, side, side, 2 * channels), (3, 3, 2, channels), (2, channels)),
    count=2.0 * 9 * batch * side * side * 2 * channels,
  )


def _linear_attention(batch: int, tokens: int, heads: int) -> Row:
  shape = (batch, tokens, heads, 32)
  return _op(
    linear_attention.relu_linear_attention,
    *(shape, shape, shape),
    count=4.0 * batch * tokens * heads * 32 * 33,
  )


def _cross_attention(batch: int, tokens: int, heads: int, size: int) -> Row:
  text = (batch, workloads.TEXT_LENGTH, heads, size)
  return _op(
    attention.softmax_attention,
    *((batch, tokens, heads, size), text, text),
    count=4.0 * batch * tokens * workloads.TEXT_LENGTH * heads * size,
  )


_600M, _1600M = config_lib.sana_600m, config_lib.sana_1600m
ROWS = {
  "gated_conv_1600m_1024": _gated_conv(2, 32, 5600),
  "linear_attention_1600m_1024": _linear_attention(2, 1024, 70),
  "cross_attention_1600m_1024": _cross_attention(2, 1024, 20, 112),
  "block_600m_512": _sample_block(_600M, 512),
  "block_600m_1024": _sample_block(_600M, 1024),
  "block_1600m_512": _sample_block(_1600M, 512),
  "block_1600m_1024": _sample_block(_1600M, 1024),
  "block_1600m_1024_text64": _sample_block(_1600M, 1024, length=64),
  "block_1600m_4096": _sample_block(_1600M, 4096),
  "train_block_600m_1024": _train_block(_600M, 1024),
  "train_block_1600m_1024": _train_block(_1600M, 1024),
  "decode_1024": _decode(1024),
}


def main(argv: list[str]) -> int:
  args = _parse(argv)
  jax.config.update("jax_platforms", "cpu")
  output = epath.Path(args.output)
  wanted = [
    (name, chip)
    for name in args.row or ROWS
    for chip in args.chip or CHIPS
    if args.row or not _file(output, name, chip).exists()
  ]
  for name, chip in () if args.table else wanted:
    try:
      made = measure(ROWS[name], chip)
    except ModuleNotFoundError as error:
      sys.stderr.write(f"{NAME}: {error}\n")
      return 1
    made |= {
      "kind": NAME,
      "row": name,
      "environment": records.environment(NAME, argv),
    }
    records.write(_file(output, name, chip), made)
    sys.stderr.write(f"{name} on {chip}: {made['compile_seconds']:.0f} s\n")
  records.show(table(read(output)))
  return 0


def measure(row: Row, chip: str) -> dict[str, Any]:
  """Compiles a row for a chip; returns what the compiler says of it.

  Raises:
    ModuleNotFoundError: libtpu is not installed.
  """
  mesh = topology.one_chip(CHIPS[chip])
  function, args = row.make()
  whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  placed = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    args,
  )
  lowered = jax.jit(function).lower(*placed)
  started = time.monotonic()
  found = {"chip": chip, "analytic_flops": row.flops, "error": None}
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    found["error"] = str(error).splitlines()[0]
  found["compile_seconds"] = time.monotonic() - started
  return found if found["error"] else found | account(compiled)


def account(compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Reads a compiled program's costs; loops count every turn."""
  text = compiled.as_text()
  module = hlo.parse(text)
  runs = hlo.executions(
    module, lambda one: "estimated_cycles" in one.attributes
  )
  cycles = sum(
    one.times * int(found[1])
    for one in runs
    if (found := _CYCLES.search(one.instruction.attributes))
  )
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  return {
    "estimated_cycles": cycles,
    "vmem_bytes": max(map(int, _SCOPED.findall(text)), default=0),
    "temporary_bytes": memory.temp_size_in_bytes,
    "argument_bytes": memory.argument_size_in_bytes,
    "flops": cost["flops"],
    "bytes": cost["bytes accessed"],
    "kernels": text.count('custom_call_target="tpu_custom_call"'),
    "grouped_convolutions": len(
      re.findall(r"feature_group_count=(?!1\b)\d+", text)
    ),
  }


def read(output: epath.Path) -> list[dict[str, Any]]:
  """Returns what records there are, in the order of the rows."""
  files = (_file(output, name, chip) for name in ROWS for chip in CHIPS)
  return [json.loads(file.read_text()) for file in files if file.exists()]


def table(found: list[dict[str, Any]]) -> str:
  """Writes records as a table."""
  header = (
    *("what", "chip", "compiles", "kernels", "VMEM of one", "temporaries"),
    *("FLOP", "of the model's", "bytes", "estimated cycles", "at best"),
  )
  return tables.markdown(header, [_cells(one) for one in found])


def _cells(one: dict[str, Any]) -> tuple[Any, ...]:
  if one["error"]:
    return (one["row"], one["chip"], f"no: {one['error']}", *("-",) * 8)
  chip = hardware.CHIPS[one["chip"]]
  best = max(one["flops"] / chip.flops, one["bytes"] / chip.hbm_bandwidth)
  analytic = one["analytic_flops"]
  return (
    one["row"],
    one["chip"],
    "yes",
    one["kernels"],
    tables.quantity(one["vmem_bytes"], "B"),
    tables.quantity(one["temporary_bytes"], "B"),
    tables.quantity(one["flops"], "FLOP"),
    f"{one['flops'] / analytic:.3f}" if analytic else "-",
    tables.quantity(one["bytes"], "B"),
    f"{one['estimated_cycles'] / 1e6:.3g} M",
    tables.seconds(best),
  )


def _file(output: epath.Path, name: str, chip: str) -> epath.Path:
  return output / f"{name}_{chip}.json"


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--output", default="docs/bench/aot", help="directory of the records")
  add(
    "--row", action="append", choices=list(ROWS), help="default: missing ones"
  )
  add(
    "--chip", action="append", choices=list(CHIPS), help="default: all of them"
  )
  add("--table", action="store_true", help="only print the table")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
