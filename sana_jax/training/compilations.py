"""Every shape of a batch is compiled once: says when, and notices more."""

from collections.abc import Callable
from typing import Any

import jax
from absl import logging


def name_leaves(batch: Any) -> str:
  """Names a batch by the shapes of its arrays."""
  return ", ".join(
    "x".join(map(str, leaf.shape)) for leaf in jax.tree.leaves(batch)
  )


class Compilations:
  """Counts the shapes of batches, and the programs made for them.

  Args:
    num_shapes: that the input may have.
    name: of a batch's shape.
  """

  def __init__(self, num_shapes: int, name: Callable[[Any], str]):
    self._num_shapes = num_shapes
    self._name = name
    self._seen: set[Any] = set()
    self._programs = 0

  def is_new(self, batch: Any) -> bool:
    """Returns, and logs, whether no batch before had this shape."""
    shape = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
    if shape in self._seen:
      return False
    self._seen.add(shape)
    logging.info(
      "compiling for %s (%d of %d shapes)",
      *(self._name(batch), len(self._seen), self._num_shapes),
    )
    return True

  def count(self, programs: int) -> None:
    """Warns of programs that no shape accounts for.

    Args:
      programs: that exist by now.
    """
    if programs > max(self._programs, len(self._seen)):
      logging.warning(
        "%d programs for %d shapes: something else than the shape of the batch "
        "changes from step to step, and compiling takes its time",
        *(programs, len(self._seen)),
      )
    self._programs = programs
