"""Times every operation at real shapes against what the device can do.

python -m bench.ops --json=docs/bench/ops_cpu.json
python -m bench.ops --only=gated_conv_1600m_1024 --dtype=bfloat16

Every implementation that runs on the device at hand, forward and with its
gradient. Bytes and operations are the least that the mathematics takes: each
operand read once, each result written once. The device's ceilings are measured
in the same run.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench import options
from bench.harness import ceilings, clocks, paired, records, tables
from sana_jax.ops import attention, gated_conv, linear_attention

NAME = "bench.ops"
_TEXT = 300


class Case(NamedTuple):
  """An operation at the shapes of a model.

  Attributes:
    flops: of the forward pass.
    implementations: beside the default.
  """

  function: Callable[..., jax.Array]
  shapes: tuple[tuple[int, ...], ...]
  flops: float
  implementations: tuple[str, ...] = ()


def _gated(batch: int, side: int, channels: int) -> Case:
  """The core of a Mix-FFN: SiLU, 3x3 taps of values and gates, bias, gate."""

  def function(x, kernel, bias, **options):
    return gated_conv.gated_conv((x,), kernel, bias, **options)

  return Case(
    function,
    (
      (batch, side, side, 2 * channels),
      *((3, 3, 2, channels), (2, channels)),
    ),
    2.0 * 9 * batch * side**2 * 2 * channels,
    implementations=("xla",),
  )


def _depthwise(batch: int, side: int, channels: int, kernel: int) -> Case:
  return Case(
    gated_conv.depthwise_conv,
    ((batch, side, side, channels), (kernel, kernel, channels)),
    2.0 * kernel**2 * batch * side**2 * channels,
    implementations=("xla",),
  )


def _linear(batch: int, tokens: int, heads: int, size: int = 32) -> Case:
  return Case(
    linear_attention.relu_linear_attention,
    ((batch, tokens, heads, size),) * 3,
    4.0 * batch * tokens * heads * size * (size + 1),
  )


def _softmax(batch: int, tokens: int, heads: int, size: int) -> Case:
  text = (batch, _TEXT, heads, size)
  return Case(
    attention.softmax_attention,
    ((batch, tokens, heads, size), text, text),
    4.0 * batch * tokens * _TEXT * heads * size,
    implementations=("cudnn",),
  )


# Guided, one picture, but for the autoencoder's.
CASES = {
  "gated_conv_600m_512": _gated(2, 16, 2880),
  "gated_conv_600m_1024": _gated(2, 32, 2880),
  "gated_conv_1600m_512": _gated(2, 16, 5600),
  "gated_conv_1600m_1024": _gated(2, 32, 5600),
  "gated_conv_1600m_4096": _gated(2, 128, 5600),
  "gated_conv_dc_ae_1024": _gated(1, 32, 4096),
  "depthwise_5x5_dc_ae_1024": _depthwise(1, 32, 3072, 5),
  "linear_attention_600m_1024": _linear(2, 1024, 36),
  "linear_attention_1600m_512": _linear(2, 256, 70),
  "linear_attention_1600m_1024": _linear(2, 1024, 70),
  "linear_attention_1600m_4096": _linear(2, 16384, 70),
  "linear_attention_dc_ae_1024": _linear(1, 1024, 64),
  "cross_attention_600m_1024": _softmax(2, 1024, 16, 72),
  "cross_attention_1600m_512": _softmax(2, 256, 20, 112),
  "cross_attention_1600m_1024": _softmax(2, 1024, 20, 112),
  "cross_attention_1600m_4096": _softmax(2, 16384, 20, 112),
  "tiny_gated_conv": _gated(1, 4, 8)._replace(implementations=()),
  "tiny_depthwise": _depthwise(1, 4, 8, 3)._replace(implementations=()),
  "tiny_linear_attention": _linear(1, 16, 2, 4),
  "tiny_cross_attention": _softmax(1, 4, 2, 4)._replace(implementations=()),
}
# Where an implementation is there, and not the default.
_DEVICES = {"cudnn": "gpu", "xla": "tpu"}
# float32 against the default implementation's.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def main(argv: list[str]) -> int:
  args = _parse(argv)
  options.set_device(args.device)
  on_cpu = jax.default_backend() == "cpu"
  args.dtype = args.dtype or ("float32" if on_cpu else "bfloat16")
  real = [name for name in CASES if not name.startswith("tiny")]
  # 4096 pixels are more than a CPU does in the time.
  default = [n for n in real if not (on_cpu and n.endswith("4096"))]
  try:
    names = options.choose(args.only or default, CASES)
  except ValueError as error:
    sys.stderr.write(f"{NAME}: {error}\n")
    return 1
  size = "tiny" if all(name.startswith("tiny") for name in names) else ""
  found = {
    "kind": NAME,
    "environment": records.environment(NAME, argv),
    "options": vars(args),
    "ceilings": ceilings.measure(
      args.dtype, **options.ceiling_sizes(size)
    )._asdict(),
    "rows": [],
  }
  for name in names:
    found["rows"] += measure(name, args.dtype, args.seconds)
    if args.json:
      records.write(args.json, found)
  records.show(table(found))
  return 0


def measure(name: str, dtype: str, seconds: float) -> list[dict[str, Any]]:
  """Times a case, each implementation forward and with its gradient.

  Raises:
    AssertionError: an implementation computes something else.
  """
  case = CASES[name]
  rng = np.random.default_rng(0)
  args = [jnp.asarray(rng.normal(size=s), dtype) for s in case.shapes]
  rows, expected, here = [], {}, jax.default_backend()
  for implementation in (None, *case.implementations):
    if _DEVICES.get(implementation, here) != here:
      continue
    function = _with(case.function, implementation)
    for direction, run in _directions(function, len(args)).items():
      row = {"case": name, "implementation": implementation or "default"}
      row |= {"direction": direction} | _work(case, args, direction)
      try:
        outputs = jax.block_until_ready(run(*args))
      except NotImplementedError as error:
        rows.append(row | {"seconds": None, "reason": str(error)})
        continue
      leaves = _numbered(outputs)
      row["errors"] = paired.check_parity(
        f"{name}, {implementation}",
        leaves,
        expected.setdefault(direction, leaves),
        tolerance=_TOLERANCE[dtype],
      )
      rows.append(row | {"seconds": _time(run, args, seconds)})
  return rows


def _with(function: Callable, implementation: str | None) -> Callable:
  if implementation is None:
    return function
  return lambda *args: function(*args, implementation=implementation)


def _directions(function: Callable, count: int) -> dict[str, Callable]:
  def loss(*args):
    return (function(*args).astype(jnp.float32) ** 2).sum()

  gradient = jax.value_and_grad(loss, argnums=tuple(range(count)))
  return {"forward": jax.jit(function), "gradient": jax.jit(gradient)}


def _work(
  case: Case, args: list[jax.Array], direction: str
) -> dict[str, float]:
  operands = sum(array.nbytes for array in args)
  result = jax.eval_shape(case.function, *args)
  result = result.size * result.dtype.itemsize
  if direction == "forward":
    return {"flops": case.flops, "bytes": operands + result}
  # Forward; then the operands again, and a derivative of each written.
  return {"flops": 3 * case.flops, "bytes": 3 * operands + 2 * result}


def _numbered(outputs: Any) -> dict[str, np.ndarray]:
  leaves = jax.tree.leaves(outputs)
  return {str(i): np.asarray(x, np.float32) for i, x in enumerate(leaves)}


def _time(run: Callable, args: list[jax.Array], seconds: float) -> float:
  def call():
    return jax.block_until_ready(run(*args))

  once = clocks.repeat(call).wall
  calls = clocks.calls_for(once, 0.02)
  reps = min(30, max(3, int(seconds / (calls * once))))
  return float(
    np.median([clocks.repeat(call, calls).wall for _ in range(reps)])
  )


def table(found: dict[str, Any]) -> str:
  """Writes a record as a table."""
  header = (
    *("operation", "implementation", "direction", "time", "at best"),
    *("bytes/s", "of the ceiling", "FLOP/s", "of the ceiling"),
  )
  return tables.markdown(
    header, [_cells(row, found["ceilings"]) for row in found["rows"]]
  )


def _cells(row: dict[str, Any], ceiling: dict[str, Any]) -> tuple[Any, ...]:
  what = (row["case"], row["implementation"], row["direction"])
  if row["seconds"] is None:
    return (*what, f"no: {row['reason']}", *("-",) * 5)
  moved, done = (row[key] / row["seconds"] for key in ("bytes", "flops"))
  best = max(
    row["bytes"] / ceiling["bandwidth"], row["flops"] / ceiling["flops"]
  )
  return (
    *what,
    tables.seconds(row["seconds"]),
    tables.seconds(best),
    tables.quantity(moved, "B/s"),
    tables.share(moved, ceiling["bandwidth"]),
    tables.quantity(done, "FLOP/s"),
    tables.share(done, ceiling["flops"]),
  )


def _parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--only", action="append", help="a case; may be repeated")
  add("--device", choices=["cpu", "gpu", "tpu"], help="default: JAX's choice")
  add("--dtype", choices=["float32", "bfloat16"], help="default: by device")
  add("--seconds", type=float, default=3.0, help="of each row")
  add("--json", help="file of the record")
  return parser.parse_args(argv)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
