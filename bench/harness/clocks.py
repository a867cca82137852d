"""Clocks of a repetition: wall, this process, and what disturbed them."""

import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

_STAT = pathlib.Path("/proc/stat")


class Reading(NamedTuple):
  """The clocks at one moment, in seconds since some fixed ones.

  Attributes:
    wall: of the world.
    cpu: of all threads of this process.
    busy: of all cores together, computing for whatever process.
    steal: of all cores together, taken away by the hypervisor.
  """

  wall: float
  cpu: float
  busy: float
  steal: float


class Rep(NamedTuple):
  """One repetition; seconds a call.

  Attributes:
    cpu: of all threads of the process.
    foreign: cores that other processes kept busy meanwhile, on average.
    steal: cores that the hypervisor took meanwhile, on average.
  """

  wall: float
  cpu: float
  foreign: float
  steal: float

  @property
  def disturbance(self) -> float:
    return self.foreign + self.steal


class Clock(Protocol):
  def __call__(self) -> Reading: ...


def read() -> Reading:
  """Reads the clocks; where there is no /proc/stat, nobody else is busy."""
  busy, steal = _system() if _STAT.exists() else (time.process_time(), 0.0)
  return Reading(time.perf_counter(), time.process_time(), busy, steal)


def repeat(
  call: Callable[[], Any], calls: int = 1, *, clock: Clock = read
) -> Rep:
  """Times `calls` calls; each must end before it returns."""
  start = clock()
  for _ in range(calls):
    call()
  stop = clock()
  wall, cpu, busy, steal = (b - a for a, b in zip(start, stop, strict=True))
  return Rep(
    wall / calls,
    cpu / calls,
    # /proc/stat counts in hundredths of a second: it may lag behind.
    max(busy - cpu, 0.0) / wall,
    steal / wall,
  )


def calls_for(seconds: float, least: float) -> int:
  """Returns how many calls of `seconds` fill a repetition of `least`."""
  return max(1, math.ceil(least / max(seconds, 1e-6)))


def _system() -> tuple[float, float]:
  # cpu  user nice system idle iowait irq softirq steal guest guest_nice
  fields = [int(n) for n in _STAT.read_text().split("\n", 1)[0].split()[1:]]
  tick = os.sysconf("SC_CLK_TCK")
  user, nice, system, _, _, irq, softirq, steal = fields[:8]
  return (user + nice + system + irq + softirq) / tick, steal / tick
