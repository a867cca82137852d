"""Reads the text of a compiled program: what runs, and how often.

A loop's body is there once, whatever the number of its turns. `executions`
goes through the program as a device does and says how often each instruction
runs, which XLA's own accounts of cost leave out.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_ASSIGNMENT = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(
  r"\b(?:calls|body|true_computation|false_computation)=%?([\w.\-]+)"
)
_APPLIED = re.compile(r"\bto_apply=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_NAME = re.compile(r"%?([\w.\-]+)$")
_OPEN, _CLOSE = "([{", ")]}"


class Instruction(NamedTuple):
  """One line of a program.

  Attributes:
    shape: of the result, as written, such as "bf16[8,128]{1,0}".
    operands: names, or what is written in their place.
    attributes: everything behind the operands.
  """

  name: str
  shape: str
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


class Module(NamedTuple):
  """A program: its computations, by name."""

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str


class Execution(NamedTuple):
  """An instruction, where it stands, and how often it runs."""

  instruction: Instruction
  computation: str
  times: int


def parse(text: str) -> Module:
  """Parses what `jax.stages.Compiled.as_text` returns.

  Raises:
    ValueError: it is no program.
  """
  computations: dict[str, dict[str, Instruction]] = {}
  entry, current = None, None
  for line in text.splitlines():
    header = _HEADER.match(line)
    if header:
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
      continue
    assignment = _ASSIGNMENT.match(line)
    if assignment and current is not None:
      instruction = _instruction(*assignment.groups())
      current[instruction.name] = instruction
  if entry is None:
    raise ValueError(
      f"The text holds no ENTRY computation, so it is no compiled program; it "
      f"begins with {text[:80]!r}."
    )
  return Module(computations, entry)


def executions(
  module: Module, wanted: Callable[[Instruction], bool]
) -> Iterator[Execution]:
  """Yields the wanted instructions that run, with how often they do.

  Of a conditional every branch counts, as if each were taken.

  Raises:
    ValueError: the turns of a loop with wanted instructions cannot be told.
  """
  holds: dict[str, bool] = {}

  def matters(name: str) -> bool:
    if name not in holds:
      holds[name] = any(
        wanted(one) or any(map(matters, called(one)))
        for one in module.computations[name].values()
      )
    return holds[name]

  def run(name: str, times: int) -> Iterator[Execution]:
    for one in module.computations[name].values():
      if wanted(one):
        yield Execution(one, name, times)
      inner = [other for other in called(one) if matters(other)]
      if inner and one.opcode == "while":
        turns = times * trip_count(module, name, one)
      else:
        turns = times
      for other in inner:
        yield from run(other, turns)

  return run(module.entry, 1)


def called(instruction: Instruction) -> list[str]:
  """Returns the computations an instruction runs.

  Conditions of loops, and what a reduction does with two numbers, are left out;
  so is what only ends elsewhere.
  """
  if instruction.opcode in ("async-update", "async-done"):
    return []
  names = _CALLED.findall(instruction.attributes)
  if instruction.opcode == "call":
    names += _APPLIED.findall(instruction.attributes)
  for branches in _BRANCHES.findall(instruction.attributes):
    names += [name.strip().lstrip("%") for name in branches.split(",")]
  return names


def trip_count(module: Module, computation: str, loop: Instruction) -> int:
  """Returns the turns of a loop that counts up by one, as `lax.scan` does.

  Raises:
    ValueError: neither XLA nor the loop's condition says.
  """
  known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", loop.attributes)
  found = condition and _count_of(
    module.computations[condition[1]],
    module.computations[computation],
    loop,
  )
  if found is None:
    raise ValueError(
      f"The turns of loop {loop.name} cannot be told from its condition, so "
      f"what it does cannot be counted."
    )
  return found


def _count_of(
  condition: Mapping[str, Instruction],
  around: Mapping[str, Instruction],
  loop: Instruction,
) -> int | None:
  root = next(one for one in condition.values() if one.is_root)
  if root.opcode != "compare" or "direction=LT" not in root.attributes:
    return None
  counter, bound = (condition.get(name) for name in root.operands)
  limit = _constant(bound)
  if limit is None or counter.opcode != "get-tuple-element":
    return None
  index = int(re.search(r"index=(\d+)", counter.attributes)[1])
  initial = around.get(loop.operands[0])
  if initial is None or initial.opcode != "tuple":
    return limit
  start = _constant(around.get(initial.operands[index]))
  return limit - (start or 0)


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != "constant":
    return None
  text = instruction.operands[0]
  return int(text) if re.fullmatch(r"-?\d+", text) else None


def _instruction(root: str | None, name: str, text: str) -> Instruction:
  shape, text = _cut(text, " ")
  opcode, _, text = text.partition("(")
  operands, attributes = _cut(text, ")")
  return Instruction(
    name,
    shape,
    opcode.strip(),
    tuple(_operand(part) for part in split(operands)),
    attributes,
    root is not None,
  )


def _operand(text: str) -> str:
  """Returns an operand's name, without the type that may stand before it."""
  found = _NAME.search(text)
  return found[1] if found else text


def split(text: str) -> list[str]:
  """Splits at the commas that stand in no brackets; comments are dropped."""
  parts, rest = [], re.sub(r"/\*.*?\*/", "", text)
  while rest:
    part, rest = _cut(rest, ",")
    parts.append(part.strip())
  return parts


def _cut(text: str, mark: str) -> tuple[str, str]:
  """Cuts at the first `mark` that stands in no brackets."""
  depth = 0
  for index, letter in enumerate(text):
    if letter == mark and depth == 0:
      return text[:index], text[index + 1 :]
    depth += (letter in _OPEN) - (letter in _CLOSE)
  return text, ""
