"""Tells the host at every step of a sampler what the picture is becoming.

The sampler stays one program on the devices; the program that reports calls one
function of this module, so it is compiled once for all that watch.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float, Int

# (number of the step from 1, number of steps, estimate of the clean latents
# "b h w c" in the transformer's scale).
StepFn: TypeAlias = Callable[[int, int, np.ndarray], None]

# Values that are handed over at a time. JAX copies more than 100 kB in a thread
# of a pool that the devices may have used up (on CPU): it would wait for ever.
_PIECE = 16384


class Watching(NamedTuple):
  """Arguments of `denoising.denoise` that make it report."""

  shared: Mapping[str, Int[np.ndarray, ""]]
  batched: Mapping[str, Int[np.ndarray, " b"]]


@contextlib.contextmanager
def watch(
  on_step: StepFn, num_steps: int, shape: tuple[int, ...]
) -> Iterator[Watching]:
  """Has `on_step` called for the sampler that gets these arguments.

  It is called from another thread, and the devices wait for it. If it raises,
  they skip the steps that are left, and leaving the context raises the same.

  Args:
    num_steps: of the schedule.
    shape: of the latents of the whole batch, however it is cut over devices.
  """
  run = _Run(on_step, num_steps, shape)
  number = next(_NUMBERS)
  _RUNS[number] = run
  try:
    yield Watching({"run": np.int32(number)}, {"rows": np.arange(shape[0])})
  finally:
    del _RUNS[number]
  if run.error is not None:
    raise run.error


def report(
  run: Int[Array, ""],
  index: Int[Array, ""],
  rows: Int[Array, " b"],
  denoised: Float[Array, "b h w c"],
) -> Bool[Array, ""]:
  """Reports a step from within a program; returns whether to stop.

  Args:
    run: as `watch` gives it, like `rows`.
    index: of the step, from 0.
  """
  stop = jax.ShapeDtypeStruct((), jnp.bool_)
  values = denoised.reshape(-1)
  pieces = [values[i : i + _PIECE] for i in range(0, values.size, _PIECE)]
  return io_callback(_take, stop, run, index, rows, *pieces, ordered=False)


class _Run:
  """Puts the parts of each step together that the devices report."""

  def __init__(self, on_step: StepFn, num_steps: int, shape: tuple[int, ...]):
    self.error: BaseException | None = None
    self._on_step = on_step
    self._num_steps = num_steps
    self._shape = shape
    self._parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    self._last = -1
    self._lock = threading.Lock()

  def take(self, index: int, rows: np.ndarray, values: np.ndarray) -> bool:
    with self._lock:
      # A batch that was filled up reports its last sample several times.
      if self.error is None and index > self._last:
        self._add(index, rows, values)
      return self.error is not None

  def _add(self, index: int, rows: np.ndarray, values: np.ndarray) -> None:
    if index not in self._parts:
      whole = np.empty(self._shape, values.dtype)
      self._parts[index] = whole, np.zeros(self._shape[0], bool)
    whole, there = self._parts[index]
    whole[rows] = values.reshape(len(rows), *self._shape[1:])
    there[rows] = True
    if not there.all():
      return
    self._last = index
    self._parts = {i: part for i, part in self._parts.items() if i > index}
    try:
      self._on_step(index + 1, self._num_steps, whole)
    except BaseException as error:  # raised where the caller is
      self.error = error


_NUMBERS = itertools.count()
_RUNS: dict[int, _Run] = {}


def _take(run, index, rows, *pieces) -> np.ndarray:
  values = np.concatenate([np.asarray(piece) for piece in pieces])
  stop = _RUNS[int(run)].take(int(index), np.asarray(rows), values)
  return np.bool_(stop)
