"""Says what filled a device's memory, and what would help."""

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from sana_jax import config as config_lib
from sana_jax.training import budget, speed
from sana_jax.training import step as step_lib

_GIB = 2**30
_FEWER_PICTURES = """\
fewer pictures: the same --config.batch_size on more devices, or a smaller
     one, which is another run"""
_MORE_PARTS = """\
the batch in more parts, one after the other; what is learned stays, and a
     run may go on so: more --config.optim.accumulation (now {accumulation},
     which leaves a device {pictures} pictures of a part)"""
_FEWER_ACTIVATIONS = "fewer activations: {remats} (now {remat!r})"
_SMALLER_SHARE = """\
a smaller share of the state per device: more --config.mesh.fsdp (now
     {fsdp}), an optimiser with a smaller state (--config.optim.name), or
     parts of it on the host (--config.hardware.offload)"""
_NO_AVERAGE = "no average: --config.ema_decay=0 (now {ema_decay:g})"
_NOTHING_ELSE = "nothing else in the device's memory: no other program uses it"
_FEWER_PROMPTS = "fewer pictures: fewer prompts in sample_prompts (config file)"
_NO_SAMPLES = """\
none while training: --config.sample_every at least --config.num_steps,
     and sample.py --checkpoint=WORKDIR on another machine"""

_EXPORT_LATER = """\
nothing is lost, step {num_steps} is saved: the same command writes the
     export on devices with more memory, or on more of them"""


class What(NamedTuple):
  """What may run out of memory.

  Attributes:
    name: the subject of a sentence, with its verb.
    knobs: what to turn, cheapest first; those with nothing left to turn are
      not offered.
  """

  name: str
  knobs: tuple[str, ...]


STEP = What(
  "the step does",
  (_MORE_PARTS, _FEWER_ACTIVATIONS, _FEWER_PICTURES, _SMALLER_SHARE),
)
STATE = What(
  "the state of the run does", (_SMALLER_SHARE, _NO_AVERAGE, _NOTHING_ELSE)
)
SAMPLES = What(
  "the state and samples beside it do",
  (_FEWER_PROMPTS, _NO_SAMPLES, _SMALLER_SHARE),
)
EXPORT = What(
  "the state and the export beside it do",
  (_EXPORT_LATER, _SMALLER_SHARE, _NOTHING_ELSE),
)


@contextlib.contextmanager
def explained(
  what: What,
  parts: Callable[[], dict[str, int]],
  config: config_lib.TrainConfig,
  mesh: jax.sharding.Mesh,
) -> Iterator[None]:
  """Makes a budget of XLA's error when memory runs out inside.

  Args:
    parts: returns the bytes per device by what they are for.

  Raises:
    MemoryError: it did; the message has the bytes by category.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    # A stage of a pipeline has a report of its own around them.
    message = getattr(error, "xla", str(error))
    if "RESOURCE_EXHAUSTED" not in message:
      raise
    now = _now(config, mesh)
    exhausted = {
      _MORE_PARTS: now["pictures"] <= 1,
      _FEWER_ACTIVATIONS: not now["remats"],
    }
    offered = [knob for knob in what.knobs if not exhausted.get(knob)]
    knobs = [
      f"  {number}. {knob.format(**now)}"
      for number, knob in enumerate(offered, 1)
    ]
    lines = [
      describe(what.name, message, parts()),
      "What would help, cheapest first:",
      *knobs,
    ]
    raise MemoryError("\n".join(lines)) from error


def _now(
  config: config_lib.TrainConfig, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """Returns what knobs say of a run: how they are turned, and how far."""
  offload = "offload, which\n     keeps them in the host's memory"
  parts = config.optim.accumulation
  copies = mesh.shape.get("data", 1) * mesh.shape.get("fsdp", 1)
  return {
    "accumulation": parts,
    "pictures": config.batch_size // (copies * parts),
    "remat": config.remat,
    "remats": {
      "full": f"--config.remat={offload}",
      "offload": "",
    }.get(config.remat, f"--config.remat=full, or {offload}"),
    "fsdp": mesh.shape.get("fsdp", 1),
    "ema_decay": config.ema_decay,
    "num_steps": config.num_steps,
  }


def of_step(state: Any, frozen: Any, batch: Any) -> dict[str, int]:
  """Returns the bytes per device that a step needs for sure.

  Args:
    state: of the run, arrays or abstract, as all are.
  """
  parts = budget.state_budget(state)
  # Of the parameters' shapes, all at the same time before the update.
  parts["gradients"] = parts["parameters"]
  parts["fixed parts"] = budget.per_device_bytes(frozen)
  parts["batch"] = budget.per_device_bytes(batch)
  return parts


def of_samples(state: step_lib.TrainState, frozen: Any) -> dict[str, int]:
  """Returns the bytes of a device that has the model beside the state.

  Samples are made of it, and the export is.

  Where other processes hold a part of the model, this one gathers the whole on
  the host; the pipeline then has it on its device.
  """
  parts = budget.state_budget(state)
  parts["fixed parts"] = budget.per_device_bytes(frozen)
  whole = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state.params
  )
  parts["the model beside it"] = budget.per_device_bytes(whole)
  return parts


def describe(what: str, message: str, parts: Mapping[str, int]) -> str:
  """Formats the bytes per device of what does not fit.

  Args:
    what: see `What.name`.
    message: XLA's.
  """
  parts = dict(parts)
  known = sum(parts.values())
  needed = _needed_bytes(message)
  if needed is not None and needed > known:
    parts["activations and other temporaries"] = int(needed - known)
  lines = [f"{what} not fit the memory of a device (GiB per device):"]
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
