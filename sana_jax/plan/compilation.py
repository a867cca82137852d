"""Compiles the step of a training run for devices that need not be there."""

import functools
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.models import sana
from sana_jax.training import budget, inputs, placement, text_to_image
from sana_jax.training import program as program_lib

# How XLA says that a program needs more than there is: of everything, or of
# temporaries alone.
_TOO_MUCH = re.compile(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", re.I)
_TOO_MANY_TEMPORARIES = re.compile(
  r"required for HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM"
)
_UNIT = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

PARAM_AXES = {"transformer": sana.PARAM_AXES}


class Step(NamedTuple):
  """A training step and the shapes it is called with.

  Attributes:
    program: what the training loop runs, too.
    batch: global, shardings included; latents and text states.
    frozen: what else the loss needs.
    key: of the step's randomness.
  """

  program: program_lib.Program
  batch: dict[str, jax.ShapeDtypeStruct]
  frozen: dict[str, jax.ShapeDtypeStruct]
  key: jax.ShapeDtypeStruct


class Compiled(NamedTuple):
  """What XLA says of a program, per device.

  Attributes:
    memory: bytes by what they are for; None: XLA did not say which.
    total: bytes that the program needs.
    on_host: bytes that it needs in the memory of the device's host.
    text: the program; None: it was not made, for lack of memory.
    seconds: that compiling took.
  """

  memory: Mapping[str, int] | None
  total: int
  on_host: int
  text: str | None
  seconds: float


def make_step(
  config: config_lib.TextToImageConfig,
  mesh: jax.sharding.Mesh,
  latent_size: tuple[int, int],
) -> Step:
  """Builds the step of a run on latents and text states, all abstract.

  Raises:
    ValueError: a run of another kind, or a batch that the mesh does not divide.
  """
  program = make_program(config, mesh)
  batch = inputs.abstract_batch(config, *latent_size)
  places = placement.batch_shardings(batch, mesh)
  whole = sharding.replicated(mesh)
  return Step(
    program,
    jax.tree.map(_placed, batch, places),
    jax.tree.map(
      lambda leaf: _placed(leaf, whole), inputs.abstract_frozen(config)
    ),
    _placed(jax.eval_shape(lambda: jax.random.key(0)), whole),
  )


def make_program(
  config: config_lib.TextToImageConfig, mesh: Any
) -> program_lib.Program:
  """Builds what the training loop runs on latents and text states.

  Args:
    mesh: one of devices, or abstract: enough for the shapes and shardings.

  Raises:
    ValueError: an axis of the mesh leaves most parameters whole.
  """
  return program_lib.make_program(
    config,
    init=lambda key: text_to_image.init_params(config, key),
    param_axes=PARAM_AXES,
    loss_fn=functools.partial(
      text_to_image.flow_loss,
      config=config,
      condition=inputs.cached_conditions,
    ),
    mesh=mesh,
  )


def compile_step(
  step: Step, options: Mapping[str, bool | int] | None = None
) -> Compiled:
  """Compiles a step as the training loop does.

  Args:
    options: of the compiler, see `topology.compiler_options`.
  """
  lowered = step.program.step.lower(
    step.program.state, step.frozen, step.key, step.batch
  )
  start = time.monotonic()
  try:
    compiled = lowered.compile(dict(options or {}))
  except jax.errors.JaxRuntimeError as error:
    needed = needed_bytes(str(error), sum(_held(step).values()))
    if needed is None:
      raise
    on_host = budget.host_bytes(step.program.state)
    return Compiled(None, needed, on_host, None, time.monotonic() - start)
  seconds = time.monotonic() - start
  stats = compiled.memory_analysis()
  memory = _memory(step, stats)
  on_host = stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes
  total = sum(memory.values())
  return Compiled(memory, total, on_host, compiled.as_text(), seconds)


def needed_bytes(message: str, held: int) -> int | None:
  """Reads from XLA's error how much a program needs; None: it says not.

  Args:
    held: bytes of the arguments.
  """
  for pattern, beside in ((_TOO_MUCH, 0), (_TOO_MANY_TEMPORARIES, held)):
    found = pattern.search(message)
    if found:
      return beside + int(float(found[1]) * _UNIT[found[2]])
  return None


def _memory(step: Step, stats: Any) -> dict[str, int]:
  """Returns the bytes of a device by what they are for.

  What XLA pads small dimensions with is what its arguments have too much.
  """
  parts = _held(step)
  known = sum(parts.values())
  parts["padding"] = max(stats.argument_size_in_bytes - known, 0)
  parts["temporaries"] = stats.temp_size_in_bytes
  parts["outputs"] = max(
    stats.output_size_in_bytes - stats.alias_size_in_bytes, 0
  )
  parts["code"] = stats.generated_code_size_in_bytes
  return parts


def _held(step: Step) -> dict[str, int]:
  parts = budget.state_budget(step.program.state)
  parts["batch"] = budget.per_device_bytes((step.batch, step.frozen))
  return parts


def _placed(leaf: Any, place: jax.sharding.NamedSharding) -> Any:
  return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)
