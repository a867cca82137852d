"""What a work directory says of itself: `run.json` and `run.log`."""

import contextlib
import importlib.metadata
import json
import logging as std_logging
import pathlib
import platform
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

_PACKAGES = (
  *("sana_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint"),
  *("grain", "numpy"),
)


def add_start(
  workdir: epath.Path,
  mesh: jax.sharding.Mesh,
  *,
  first_step: int,
  argv: Sequence[str],
) -> None:
  """Appends to `run.json`, a list with an entry for every start of the run.

  Args:
    argv: the command that started it.
  """
  path = workdir / "run.json"
  starts = json.loads(path.read_text()) if path.exists() else []
  starts.append(_describe(mesh, first_step, argv))
  partial = workdir / "run.json.partial"
  partial.write_text(json.dumps(starts, indent=2))
  partial.replace(path)


@contextlib.contextmanager
def logging_to(path: epath.Path) -> Iterator[None]:
  """Appends what is logged inside to a file."""
  handler = _FileHandler(path)
  handler.setLevel(std_logging.INFO)
  handler.setFormatter(logging.PythonFormatter())
  for one in logging.get_absl_handler().filters:
    handler.addFilter(one)
  logger = logging.get_absl_logger()
  logger.addHandler(handler)
  try:
    yield
  finally:
    logger.removeHandler(handler)


class _FileHandler(std_logging.Handler):
  """Opens the file for every line: a bucket has no open files."""

  def __init__(self, path: epath.Path):
    super().__init__()
    self._path = path

  def emit(self, record: std_logging.LogRecord) -> None:
    try:
      with self._path.open("a") as file:
        file.write(self.format(record) + "\n")
    except OSError:
      self.handleError(record)


def _describe(mesh, first_step: int, argv: Sequence[str]) -> dict[str, Any]:
  device = jax.devices()[0]
  return {
    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    "command": list(argv),
    "directory": str(pathlib.Path.cwd()),
    "first_step": first_step,
    "git": _git_state(),
    "python": platform.python_version(),
    "versions": {name: _version(name) for name in _PACKAGES},
    "host": socket.gethostname(),
    "processes": jax.process_count(),
    "devices": jax.device_count(),
    "device_kind": device.device_kind,
    "platform": device.platform,
    "mesh": dict(mesh.shape),
  }


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _git_state() -> dict[str, Any] | None:
  """Returns commit and whether files differ from it; None: not a checkout."""
  root = str(pathlib.Path(__file__).parents[2])

  def run(*command: str) -> str | None:
    try:
      done = subprocess.run(
        ["git", "-C", root, *command],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
      )
    except (OSError, subprocess.TimeoutExpired):
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  commit = run("rev-parse", "HEAD")
  # Without its own repository, it might be in one of something else.
  if commit is None or run("rev-parse", "--show-toplevel") != root:
    return None
  status = run("status", "--porcelain", "--untracked-files=no")
  return {"commit": commit, "modified": bool(status)}
