"""Counts what the devices of a compiled program send each other.

The bytes are what a ring or a tree with no waste sends from each device: of n
devices, (n - 1) / n of the whole array for gathering, scattering and exchanging
it, twice that for summing it everywhere, and what it holds for passing it on.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sana_jax.plan import groups as groups_lib
from sana_jax.plan import hlo

KINDS = (
  *("all-gather", "reduce-scatter", "all-reduce"),
  *("all-to-all", "collective-permute", "collective-broadcast"),
)
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CHAIN = re.compile(r'chain_id="(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


class Array(NamedTuple):
  """The type of an array."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def elements(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> float:
    digits = re.search(r"\d+", self.dtype)
    return self.elements * (int(digits[0]) if digits else 8) / 8

  def __str__(self) -> str:
    return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Collective(NamedTuple):
  """One exchange of a program.

  Attributes:
    axes: of the mesh, along which the devices that take part differ.
    arrays: whole: gathered, or before they are scattered.
    times: in one run of the program.
    bytes: that a device sends in one run, in all `times`.
    op_name: of what the program does it for.
  """

  kind: str
  axes: tuple[str, ...]
  arrays: tuple[Array, ...]
  times: int
  bytes: float
  op_name: str


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
  """Lists the exchanges of a compiled program, the largest first.

  Args:
    text: the program, as `jax.stages.Compiled.as_text` gives it.
    mesh: the size of every axis, in the order of the mesh's devices.

  Raises:
    ValueError: a loop or a group of devices that cannot be understood.
  """
  module = hlo.parse(text)
  found: dict[tuple[str, ...], Collective] = {}
  for one in hlo.executions(module, is_collective):
    collective = _collective(module, one, mesh)
    # XLA:TPU writes a gathering that runs beside other work several times,
    # once into each of the works; they are links of one chain.
    chain = _CHAIN.search(one.instruction.attributes)
    channel = _CHANNEL.search(one.instruction.attributes)
    key = (
      ("chain", collective.kind, chain[1], channel[1] if channel else "")
      if chain
      else (one.computation, one.instruction.name, str(len(found)))
    )
    found.setdefault(key, collective)
  return sorted(
    (one for one in found.values() if one.bytes), key=lambda one: -one.bytes
  )


def totals(
  found: Iterable[Collective],
) -> dict[tuple[tuple[str, ...], str], float]:
  """Returns the bytes for each (mesh axes, kind)."""
  sums: dict[tuple[tuple[str, ...], str], float] = {}
  for one in found:
    key = (one.axes, one.kind)
    sums[key] = sums.get(key, 0.0) + one.bytes
  return sums


def is_collective(instruction: hlo.Instruction) -> bool:
  """Whether an instruction sends anything; the end of one does not."""
  return instruction.opcode.removesuffix("-start") in KINDS


def _collective(
  module: hlo.Module, one: hlo.Execution, mesh: Mapping[str, int]
) -> Collective:
  instruction = one.instruction
  kind = instruction.opcode.removesuffix("-start")
  groups = groups_lib.parse(instruction.attributes, math.prod(mesh.values()))
  arrays = _arrays(_result(instruction))
  members = len(groups[0])
  if kind == "reduce-scatter":
    arrays = [Array(part.dtype, (members, *part.shape)) for part in arrays]
  elif kind == "all-reduce" and _is_scattered(
    module.computations[one.computation], instruction
  ):
    kind = "reduce-scatter"
  size = sum(array.nbytes for array in arrays)
  op_name = _OP_NAME.search(instruction.attributes)
  return Collective(
    kind,
    groups_lib.axes_of(groups, mesh),
    tuple(arrays),
    one.times,
    one.times * _sent(kind, size, groups, mesh),
    op_name[1] if op_name else "",
  )


def _sent(kind, size, groups, mesh) -> float:
  members = len(groups[0])
  if kind == "collective-permute":
    senders = sum(source != target for source, target in groups)
    return size * senders / math.prod(mesh.values())
  if kind == "collective-broadcast":
    return size
  factor = 2 if kind == "all-reduce" else 1
  return factor * size * (members - 1) / members


def _result(instruction: hlo.Instruction) -> str:
  """Returns the shape of what an instruction makes.

  One that only starts it has a tuple of operands, results and what else it
  needs; a sum that is only started has the result alone.
  """
  is_start = instruction.opcode.endswith("-start")
  if not is_start or instruction.opcode == "all-reduce-start":
    return instruction.shape
  return hlo.split(instruction.shape[1:-1])[1]


def _arrays(shape: str) -> list[Array]:
  layouts_dropped = re.sub(r"\{[^}]*\}", "", shape)
  return [
    Array(dtype, tuple(int(size) for size in sizes.split(",") if size))
    for dtype, sizes in _ARRAY.findall(layouts_dropped)
  ]


def _is_scattered(
  computation: Mapping[str, hlo.Instruction], reduction: hlo.Instruction
) -> bool:
  """Whether only a device's part of every sum leaves the computation.

  XLA:TPU writes its reduce-scatter as a fusion of the two, of one array or of
  several.
  """
  last = next(one for one in computation.values() if one.is_root)
  results = last.operands if last.opcode == "tuple" else (last.name,)
  for name in results:
    cut = _behind(computation, name, "bitcast")
    if cut.opcode != "dynamic-slice":
      return False
    whole = _behind(computation, cut.operands[0], "get-tuple-element")
    if whole.name != reduction.name:
      return False
  return True


def _behind(
  computation: Mapping[str, hlo.Instruction], name: str, opcode: str
) -> hlo.Instruction:
  """Returns what an instruction is of, beyond any of `opcode`."""
  found = computation[name]
  while found.opcode == opcode:
    found = computation[found.operands[0]]
  return found
