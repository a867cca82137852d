"""What a figure needs beside it: machine, versions, commit, command, date."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "torch", "diffusers")
_CPUINFO = pathlib.Path("/proc/cpuinfo")


def environment(module: str, argv: Sequence[str]) -> dict[str, Any]:
  """Describes this machine and the command that runs.

  Args:
    module: such as "bench.sample".
  """
  device = jax.devices()[0]
  return {
    "command": " ".join(["python -m", module, *argv]),
    "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    "commit": commit(),
    "device": f"{len(jax.devices())} x {device.device_kind}",
    "platform": device.platform,
    "processor": processor(),
    "cores": len(os.sched_getaffinity(0)),
    "python": platform.python_version(),
    "versions": versions(),
  }


def versions() -> dict[str, str]:
  """Returns the versions of what computes, of what is installed."""
  found = {}
  for name in _PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def processor() -> str:
  """Returns the model of the processor, as it calls itself."""
  if _CPUINFO.exists():
    for line in _CPUINFO.read_text().splitlines():
      if line.startswith("model name"):
        return line.partition(":")[2].strip()
  return platform.processor() or platform.machine()


def commit() -> str | None:
  """Returns the commit, with a plus sign if files but docs differ from it."""
  directory = os.path.dirname(__file__)
  hash_ = _git(directory, "rev-parse", "--short=12", "HEAD")
  if not hash_:
    return None
  changed = _git(
    directory,
    *("status", "--porcelain", "--untracked-files=no"),
    # A record that is being written there is no change of what it is about.
    *("--", ":(top)", ":(top,exclude)docs"),
  )
  return f"{hash_}+" if changed else hash_


def write(path: epath.PathLike, record: dict[str, Any]) -> None:
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(record, indent=1) + "\n")


def show(text: str) -> None:
  sys.stdout.write(text + "\n")
  sys.stdout.flush()


def _git(directory: str, *args: str) -> str:
  found = subprocess.run(
    ["git", *args], cwd=directory, capture_output=True, text=True, check=False
  )
  return found.stdout.strip()
