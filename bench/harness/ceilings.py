"""What the device at hand can do at most: stated by its maker, and measured."""

import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sana_jax import hardware


class Ceilings(NamedTuple):
  """Operations and bytes per second.

  Attributes:
    flops: of a large matrix product, measured.
    bandwidth: of reading and writing large arrays, measured.
    stated_flops: by the maker, for bfloat16; None: a device not known.
  """

  dtype: str
  flops: float
  bandwidth: float
  stated_flops: float | None
  stated_bandwidth: float | None


def measure(
  dtype: DTypeLike, *, side: int | None = None, megabytes: int | None = None
) -> Ceilings:
  """Measures both ceilings of the default device; the best of some tries.

  Args:
    side: of the square matrices; None: by device, as `megabytes` of the array
      that is copied.
  """
  device = jax.devices()[0]
  small = device.platform == "cpu"
  side = side or (2048 if small else 8192)
  megabytes = megabytes or (256 if small else 2048)
  matrix = jnp.ones((side, side), dtype)
  product = _best(jax.jit(lambda a: a @ a), matrix)
  array = jnp.zeros(megabytes * 2**20 // 4, jnp.float32)
  copy = _best(jax.jit(lambda a: a + 1), array)
  chip = hardware.chip_of(device)
  stated = hardware.CHIPS[chip] if chip else None
  return Ceilings(
    jnp.dtype(dtype).name,
    2 * side**3 / product,
    2 * array.nbytes / copy,
    stated.flops if stated else None,
    stated.hbm_bandwidth if stated else None,
  )


def _best(function: Callable, argument: jax.Array, tries: int = 7) -> float:
  jax.block_until_ready(function(argument))
  found = []
  for _ in range(tries):
    start = time.perf_counter()
    jax.block_until_ready(function(argument))
    found.append(time.perf_counter() - start)
  return float(np.min(found))
