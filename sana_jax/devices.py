"""Whether JAX finds the devices that it is told to use."""

import importlib.metadata
from collections.abc import Mapping
from typing import NamedTuple

import jax


class _Kind(NamedTuple):
  """An accelerator, by its name in JAX_PLATFORMS and as an extra of ours.

  Attributes:
    plugins: packages, of which one makes JAX find it.
    look: how to see that it is there, and free.
  """

  plugins: tuple[str, ...]
  look: str


_KINDS = {
  "cuda": _Kind(
    ("jax-cuda13-plugin", "jax-cuda12-plugin"),
    "`nvidia-smi` lists the GPUs, and the programs that use them",
  ),
  "tpu": _Kind(
    ("libtpu",),
    "`ls /dev/accel* /dev/vfio/*` lists the chips of a TPU, which one process "
    "has at a time: end the other, a notebook's kernel too",
  ),
}


def check() -> None:
  """Looks for devices; after `jax.distributed` is set up, if it is to be.

  Raises:
    OSError: there are none, or none of the kind that JAX_PLATFORMS names; says
      what is installed, and what to do.
  """
  try:
    jax.devices()
  # Where JAX sees no NVIDIA GPU, it is an assertion of its that fails.
  except (RuntimeError, AssertionError) as error:
    asked = jax.config.jax_platforms or ""
    raise OSError(explain(asked, str(error), _installed())) from error


def explain(asked: str, reason: str, installed: Mapping[str, str]) -> str:
  """Says that there are no devices, why, and what to do.

  Args:
    asked: value of JAX_PLATFORMS.
    reason: JAX's own; may be empty.
    installed: versions of packages.
  """
  what = f"JAX_PLATFORMS={asked}" if asked else "the devices of this machine"
  # JAX's own advice is about JAX_PLATFORMS, as ours below is.
  reason = reason.partition(" (set JAX_PLATFORMS")[0].rstrip(".")
  because = f" ({reason})" if reason else ""
  packages = ", ".join(f"{name} {v}" for name, v in installed.items())
  return (
    f"JAX cannot use {what}{because}. Installed: {packages}. "
    f"{_remedy(asked, installed)} JAX_PLATFORMS=cpu computes on the CPU."
  )


def _remedy(asked: str, installed: Mapping[str, str]) -> str:
  names = set(asked.split(",")) - {"", "cpu"} or set(_KINDS)
  if not names <= set(_KINDS):
    return f"There are {', '.join(_KINDS)} and cpu."
  kinds = {name: kind for name, kind in _KINDS.items() if name in names}
  there = [k for k in kinds.values() if set(k.plugins) & set(installed)]
  if there:
    return f"{'; '.join(kind.look for kind in there)}."
  commands = [f"pip install 'sana_jax[{name}]'" for name in kinds]
  return f"JAX's plugin for it is missing: {' or '.join(commands)}."


def _installed() -> dict[str, str]:
  plugins = [name for kind in _KINDS.values() for name in kind.plugins]
  found = {}
  for name in ["jax", *plugins]:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found
