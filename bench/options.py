"""Flags that several measurements have."""

import argparse
import os
from collections.abc import Iterable, Sequence

import jax

from bench.harness import paired

AGAINST = ("eager", "compile", "none")


def add_common(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of a comparison."""
  add = parser.add_argument
  add("--only", action="append", help="a row; may be repeated; default: all")
  add("--against", choices=AGAINST, default="eager", help="PyTorch's mode")
  add("--device", choices=["cpu", "gpu"], help="default: JAX's choice")
  default = paired.Budget()
  add("--pairs", type=int, default=default.pairs, help="undisturbed, wanted")
  add("--max_pairs", type=int, default=default.max_pairs)
  add("--seconds", type=float, default=default.seconds, help="of a row")
  add("--json", help="file of the record")


def set_device(device: str | None) -> None:
  """Chooses JAX's device, before it has one; leaves PyTorch its memory."""
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  if device is not None:
    jax.config.update("jax_platforms", {"gpu": "cuda"}.get(device, device))


def choose(only: Sequence[str] | None, known: Iterable[str]) -> list[str]:
  """Returns the rows that were asked for, in their order.

  Raises:
    ValueError: a row that there is not.
  """
  known = list(known)
  wrong = [name for name in only or () if name not in known]
  if wrong:
    raise ValueError(f"--only={wrong[0]} is no row; there are {known}.")
  return [name for name in known if not only or name in only]


def budget(args: argparse.Namespace) -> paired.Budget:
  """Returns how much to measure; a GPU does not mind what the host does."""
  limits = {} if jax.default_backend() == "cpu" else {"limit": float("inf")}
  return paired.Budget(
    pairs=args.pairs,
    max_pairs=args.max_pairs,
    seconds=args.seconds,
    **limits,
  )


def ceiling_sizes(size: str) -> dict[str, int]:
  """Returns how large arrays are that ceilings are measured with."""
  return {"side": 256, "megabytes": 4} if size == "tiny" else {}
