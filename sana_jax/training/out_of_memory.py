"""Says what filled a device's memory, and what would help."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import jax

from sana_jax.training import budget, speed
from sana_jax.training import program as program_lib

_GIB = 2**30
_KNOBS = """\
What would help, cheapest first:
  1. fewer pictures at a time: a smaller --config.batch_size, or the same one
     on more devices
  2. fewer activations: --config.remat=full (now {remat!r})
  3. a smaller share of the state per device: more --config.mesh.fsdp (now
     {fsdp}), or an optimiser with a smaller state (--config.optim.name)"""


@contextlib.contextmanager
def explained(
  program: program_lib.Program,
  frozen: Any,
  batch: Any,
  *,
  remat: str,
  mesh: jax.sharding.Mesh,
) -> Iterator[None]:
  """Makes a budget of XLA's error when memory runs out inside.

  Raises:
    MemoryError: it did; the message has the bytes by category.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    text = describe(str(error), program.state, frozen, batch)
    knobs = _KNOBS.format(remat=remat, fsdp=mesh.shape.get("fsdp", 1))
    raise MemoryError(f"{text}\n{knobs}") from error


def describe(message: str, state: Any, frozen: Any, batch: Any) -> str:
  """Formats the bytes per device of a step that does not fit.

  Args:
    message: XLA's.
    state: of the run, arrays or abstract.
  """
  parts = budget.state_budget(state)
  # Of the parameters' shapes, all at the same time before the update.
  parts["gradients"] = parts["parameters"]
  parts["fixed parts"] = budget.per_device_bytes(frozen)
  parts["batch"] = budget.per_device_bytes(batch)
  known = sum(parts.values())
  needed = _needed_bytes(message)
  if needed is not None and needed > known:
    parts["activations and other temporaries"] = int(needed - known)
  lines = ["the step does not fit the memory of a device (GiB per device):"]
  lines += [f"  {size / _GIB:8.2f}  {name}" for name, size in parts.items()]
  lines.append(f"  {sum(parts.values()) / _GIB:8.2f}  in all")
  limit = speed.device_memory().get("hbm_limit_gib")
  if limit is not None:
    lines.append(f"  {limit:8.2f}  is what XLA may use")
  lines.append(f"XLA: {_first_line(message)}")
  return "\n".join(lines)


def _needed_bytes(message: str) -> float | None:
  """Returns the bytes that XLA says a program uses."""
  # Of a TPU: "Used 26.30G of 15.75G hbm."
  found = re.search(r"Used ([\d.]+)([KMGT]) of", message)
  if found is None:
    return None
  return float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2])))


def _first_line(message: str) -> str:
  return message.strip().splitlines()[0][:300]
