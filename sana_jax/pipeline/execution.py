"""Runs a pipeline's stages: compiled once per shape, batches over devices."""

import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sana_jax import sharding

# Compiled programs that are kept: a server is asked for many sizes and numbers
# of steps, and each has its own.
_CAPACITY = 64

# By what they compute, on which devices, of which shapes. They hold no weights:
# models of the same shapes share them, as with `jax.jit`.
_programs: OrderedDict[Any, Callable[..., Any]] = OrderedDict()
_lock = threading.Lock()


class Progress(NamedTuple):
  """One event: a phase begins (`seconds` is None) or has ended.

  Attributes:
    stage: "text encoder", "transformer" or "decoder".
    phase: "compile" or "run".
    seconds: how long it took.
  """

  stage: str
  phase: str
  seconds: float | None


ProgressFn = Callable[[Progress], None]


class StageMemoryError(jax.errors.JaxRuntimeError):
  """Memory ran out in a stage.

  Attributes:
    stage: as in `Progress`.
    xla: the message of XLA, which begins with RESOURCE_EXHAUSTED.
  """

  def __init__(self, stage: str, xla: str):
    super().__init__(f"Out of device memory in the {stage}. XLA: {xla}")
    self.stage, self.xla = stage, xla


class Executor:
  """Compiles functions of models and batches for a row of devices, once.

  Every device holds the models whole and computes its share of the batch,
  which is filled up to a multiple of the number of devices.
  """

  def __init__(self, devices: Sequence[jax.Device]):
    self._mesh = sharding.make_mesh({"data": len(devices)}, devices)

  @property
  def devices(self) -> list[jax.Device]:
    return list(self._mesh.devices.flat)

  def place(self, tree: Any) -> Any:
    """Puts a copy on every device; costs nothing when it is there."""
    return jax.device_put(tree, sharding.replicated(self._mesh))

  def run(
    self,
    stage: str,
    function: Callable[..., Any],
    *,
    shared: Mapping[str, Any],
    batched: Mapping[str, Any],
    static: Mapping[str, Any],
    progress: ProgressFn | None = None,
  ) -> Any:
    """Returns function(**shared, **batched, **static).

    Args:
      stage: its name in progress events.
      shared: pytrees every device needs: models, coefficients.
      batched: pytrees whose leaves have the batch as their first axis, like
        those of the result.
      static: hashable settings.
    """
    size = jax.tree.leaves(batched)[0].shape[0]
    with named(stage):
      args = self.place(dict(shared)), self._split(dict(batched), size)

    def local(shared, batched):
      return function(**shared, **batched, **static)

    data = PartitionSpec("data")
    mapped = jax.shard_map(
      local,
      mesh=self._mesh,
      in_specs=(PartitionSpec(), data),
      out_specs=data,
      check_vma=False,
    )
    key = ("all devices", function, tuple(sorted(static.items())))
    result = self._run_compiled(stage, key, mapped, args, progress)
    return jax.tree.map(lambda leaf: leaf[:size], result)

  def run_on_first(
    self,
    stage: str,
    function: Callable[..., Any],
    *,
    arguments: Mapping[str, Any],
    static: Mapping[str, Any],
    progress: ProgressFn | None = None,
  ) -> Any:
    """Returns function(**arguments, **static), from the first device.

    For work that is too small to be shared out.

    Args:
      stage: its name in progress events.
      static: hashable settings.
    """

    def local(arguments):
      return function(**arguments, **static)

    first = self._mesh.devices.flat[0]
    with named(stage):
      args = (jax.device_put(dict(arguments), first),)
    key = ("first device", function, tuple(sorted(static.items())))
    return self._run_compiled(stage, key, local, args, progress)

  def _run_compiled(self, stage, key, function, args, progress) -> Any:
    """Compiles `function` unless `key` and shapes are known, and runs it."""
    key = (tuple(self.devices), key, _signature(args))
    program = _known(key)
    if program is None:
      with named(stage), _timed(stage, "compile", progress):
        program = jax.jit(function).lower(*args).compile()
      _keep(key, program)
    with named(stage), _timed(stage, "run", progress):
      return jax.block_until_ready(program(*args))

  def _split(self, batched: Any, size: int) -> Any:
    missing = -size % self._mesh.size

    def place(leaf):
      if missing:
        last = jnp.broadcast_to(leaf[-1:], (missing, *leaf.shape[1:]))
        leaf = jnp.concatenate([leaf, last])
      return jax.device_put(leaf, sharding.batch_sharding(self._mesh))

    return jax.tree.map(place, batched)


def forget_programs() -> None:
  """Frees what compiled programs take; what runs next is compiled anew."""
  with _lock:
    _programs.clear()


def _known(key: Any) -> Callable[..., Any] | None:
  """Returns the program of this key, if it was kept, as the last one used."""
  with _lock:
    if key in _programs:
      _programs.move_to_end(key)
    return _programs.get(key)


def _keep(key: Any, program: Callable[..., Any]) -> None:
  """Keeps a program, and forgets those that were not used for longest."""
  with _lock:
    _programs[key] = program
    while len(_programs) > _CAPACITY:
      _programs.popitem(last=False)


def _signature(args: Any) -> Any:
  leaves, structure = jax.tree.flatten(args)
  shapes = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
  return structure, shapes, jax.config.jax_default_matmul_precision


@contextlib.contextmanager
def named(stage: str) -> Iterator[None]:
  """Names the stage where memory runs out inside.

  Raises:
    StageMemoryError: it did.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise StageMemoryError(stage, str(error)) from error


@contextlib.contextmanager
def _timed(stage: str, phase: str, progress: ProgressFn | None):
  if progress is None:
    yield
    return
  progress(Progress(stage, phase, None))
  start = time.monotonic()
  yield
  progress(Progress(stage, phase, time.monotonic() - start))
