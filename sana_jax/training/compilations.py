"""Every shape of a batch is compiled once, ahead of its first step."""

from collections.abc import Callable
from typing import Any

import jax
from absl import logging

from sana_jax.training import launch


def name_leaves(batch: Any) -> str:
  """Names a batch by the shapes of its arrays."""
  return ", ".join(
    "x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(batch)
  )


class Steps:
  """The step of a run, one program for every shape of a batch.

  A program that is compiled takes what it was compiled for and nothing else, so
  no step compiles by itself, whatever changes.

  Args:
    step: jitted; its last argument is the batch.
    num_shapes: that the input may have.
    name: of a batch's shape.
  """

  def __init__(
    self,
    step: jax.stages.Wrapped,
    num_shapes: int,
    name: Callable[[Any], str],
  ):
    self._step = step
    self._num_shapes = num_shapes
    self._name = name
    self._programs: dict[Any, jax.stages.Compiled] = {}

  def is_new(self, batch: Any) -> bool:
    """Returns whether nothing is compiled for this shape yet."""
    return _shapes(batch) not in self._programs

  def compile(self, *args: Any) -> None:
    """Compiles for the last of `args`, a batch; says so in the log.

    Args:
      args: of the step, arrays or abstract, shardings included.
    """
    batch = args[-1]
    logging.info(
      "compiling for %s (%d of %d shapes)",
      *(self._name(batch), len(self._programs) + 1, self._num_shapes),
    )
    compiled = launch.compile_and_meet(self._step, *args)
    self._programs[_shapes(batch)] = compiled

  def __call__(self, *args: Any) -> Any:
    """Makes a step with the program for its last argument, a batch.

    Raises:
      TypeError: types or shardings are not those that were compiled for.
    """
    batch = args[-1]
    try:
      return self._programs[_shapes(batch)](*args)
    except (TypeError, ValueError) as error:
      raise TypeError(
        f"the step that was compiled for {self._name(batch)} is called with "
        f"something else: {error}. Only the shape of the batch may differ from "
        "step to step: the types and shardings of state, fixed parts and batch "
        "must be those of the first step with this shape."
      ) from error


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
  return tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(batch))
