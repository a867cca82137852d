"""A side for tests of sides in other processes."""

import os

import numpy as np

from bench.harness import sides


def make_side(value):
  square = np.array(value) ** 2
  case = sides.Case(lambda: square, lambda y: {"y": y})
  return sides.LocalSide(
    {"square": lambda: case}, lambda: {"process": os.getpid()}
  )
