"""How fast a run is: pictures, operations, waiting, memory."""

import contextlib
import time
from collections.abc import Iterator

import jax

from sana_jax import hardware


class Chrono:
  """Speed and remaining time; the first interval (compiling) is left out.

  Args:
    devices: of the whole run.
  """

  def __init__(
    self, first_step: int, num_steps: int, batch_size: int, devices: int
  ):
    self._num_steps = num_steps
    self._batch_size = batch_size
    self._devices = devices
    self._chip = hardware.chip_of(jax.local_devices()[0])
    self._started = time.monotonic()
    self._is_first = True
    self._steps, self._flops = 0, 0.0
    self._paused, self._waited = 0.0, 0.0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Excludes what happens inside from the speed: saving, compiling."""
    started = time.monotonic()
    yield
    self._paused += time.monotonic() - started

  def count(self, flops: float) -> None:
    """Counts a step that was not made in a pause.

    Args:
      flops: operations of the step, on all devices.
    """
    self._steps += 1
    self._flops += flops

  def tick(self, step: int, waited: float) -> dict[str, float]:
    """Returns the speed since the last tick, and seconds left.

    Args:
      waited: seconds spent waiting for data since the run began.
    """
    now = time.monotonic()
    seconds = now - self._started - self._paused
    steps, flops, waiting = self._steps, self._flops, waited - self._waited
    self._started, self._waited = now, waited
    self._steps, self._flops, self._paused = 0, 0.0, 0.0
    first, self._is_first = self._is_first, False
    if first or steps <= 0 or seconds <= 0:
      return {}
    rate = steps * self._batch_size / seconds
    values = {
      "images_per_second": rate,
      "images_per_second_per_device": rate / self._devices,
      "seconds_per_step": seconds / steps,
      "data_wait": min(waiting / seconds, 1.0),
      "seconds_left": (self._num_steps - step) * seconds / steps,
    }
    if flops:
      per_device = flops / seconds / self._devices
      values["tflops_per_device"] = per_device / 1e12
      if self._chip is not None:
        values["mfu"] = per_device / hardware.CHIPS[self._chip].flops
    return values


def device_memory() -> dict[str, float]:
  """Returns the peak and the limit of a local device's memory, in GiB.

  Empty where the device does not say (a CPU).
  """
  stats = jax.local_devices()[0].memory_stats() or {}
  names = {"hbm_peak_gib": "peak_bytes_in_use", "hbm_limit_gib": "bytes_limit"}
  return {ours: stats[of] / 2**30 for ours, of in names.items() if of in stats}
