"""One side of a comparison: in this process, or in one of its own.

A side has cases by name. A case is built when it is prepared, and released
when the next one is: only one is in memory.
"""

import importlib
import importlib.util
import multiprocessing
import resource
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from bench.harness import clocks


class Case(NamedTuple):
  """Something to time.

  Attributes:
    run: computes, to the end; returns results wherever they are.
    outputs: makes arrays of the host of them, by name.
  """

  run: Callable[[], Any]
  outputs: Callable[[Any], Mapping[str, np.ndarray]]


Cases = Mapping[str, Callable[[], Case]]


class Prepared(NamedTuple):
  """What building a case gave.

  Attributes:
    outputs: of the first call.
    build_seconds: until the first call; reading weights, ahead-of-time work.
    first_seconds: of the first call, compiling included.
  """

  outputs: Mapping[str, np.ndarray]
  build_seconds: float
  first_seconds: float


class Side(Protocol):
  def prepare(self, name: str) -> Prepared: ...

  def measure(self, calls: int) -> clocks.Rep: ...

  def memory(self) -> Mapping[str, int]: ...

  def close(self) -> None: ...


class LocalSide:
  """Runs cases in this process.

  Args:
    memory: bytes by name, read after a case has run.
  """

  def __init__(
    self, cases: Cases, memory: Callable[[], Mapping[str, int]] = dict
  ):
    self._cases = cases
    self._memory = memory
    self._case: Case | None = None

  def prepare(self, name: str) -> Prepared:
    self._case = None  # Frees the case before.
    start = time.perf_counter()
    self._case = self._cases[name]()
    built = time.perf_counter()
    results = self._case.run()
    seconds = time.perf_counter() - built
    return Prepared(self._case.outputs(results), built - start, seconds)

  def measure(self, calls: int) -> clocks.Rep:
    if self._case is None:
      raise ValueError("measure: no case is prepared; call prepare first.")
    return clocks.repeat(self._case.run, calls)

  def memory(self) -> Mapping[str, int]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_host_bytes": peak, **self._memory()}

  def close(self) -> None:
    self._case = None


class RemoteSide:
  """Runs the cases of a module in a process of its own.

  Args:
    module: has `make_side(**options) -> LocalSide`; only the other process
      imports it.
  """

  def __init__(self, module: str, options: Mapping[str, Any]):
    context = multiprocessing.get_context("spawn")
    self._pipe, other = context.Pipe()
    self._process = context.Process(
      target=_serve, args=(other, module, dict(options)), daemon=True
    )
    self._process.start()
    other.close()
    self._receive()  # It is ready, or says what is wrong.

  def prepare(self, name: str) -> Prepared:
    return self._call("prepare", name)

  def measure(self, calls: int) -> clocks.Rep:
    return self._call("measure", calls)

  def memory(self) -> Mapping[str, int]:
    return self._call("memory")

  def close(self) -> None:
    if self._process.is_alive():
      self._pipe.send(None)
    self._process.join()

  def _call(self, *request: Any) -> Any:
    self._pipe.send(request)
    return self._receive()

  def _receive(self) -> Any:
    try:
      return self._pipe.recv()
    except EOFError as ended:
      self._process.join()
      raise RuntimeError(
        f"The other side ended with exit code {self._process.exitcode}; what "
        "it wrote to standard error says why."
      ) from ended


def require_torch() -> None:
  """Checks that the other side can run.

  Raises:
    ModuleNotFoundError: PyTorch or diffusers is not installed.
  """
  names = ("torch", "diffusers", "transformers")
  missing = [name for name in names if importlib.util.find_spec(name) is None]
  if missing:
    raise ModuleNotFoundError(
      f"This benchmark needs {', '.join(missing)}, which also write the "
      "weights of both sides: pip install torch diffusers transformers."
    )


def _serve(pipe, module: str, options: dict[str, Any]) -> None:
  side = importlib.import_module(module).make_side(**options)
  methods = {
    "prepare": side.prepare,
    "measure": side.measure,
    "memory": side.memory,
  }
  pipe.send(None)
  while (request := pipe.recv()) is not None:
    pipe.send(methods[request[0]](*request[1:]))
