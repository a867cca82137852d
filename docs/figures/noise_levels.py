"""How the flow shift moves noise levels, in sampling and in training."""

import pathlib

import jax
import numpy as np

from docs.figures import style
from sana_jax.diffusion import flow, schedules

SHIFTS = (1.0, 3.0, 6.0)
STEPS = 20


def draw(directory: pathlib.Path) -> None:
  """Draws sigmas of 20 steps, and densities of training levels, by shift."""
  made, (left, right) = style.figure(8, 3, columns=2)
  for shift in SHIFTS:
    schedule = schedules.FlowDPMSolver(flow_shift=shift).schedule(STEPS)
    label = f"flow_shift {shift:g}"
    left.plot(schedule.sigmas, marker=".", label=label)
    times = flow.logit_normal(jax.random.key(0), 2_000_000)
    sigmas, _ = flow.continuous_sigma(times, shift=shift)
    density, edges = np.histogram(
      np.asarray(sigmas), bins=60, range=(0, 1), density=True
    )
    right.plot((edges[1:] + edges[:-1]) / 2, density, label=label)
  left.set(
    xlabel=f"step of {STEPS}", ylabel="sigma", xticks=range(0, STEPS + 1, 5)
  )
  left.set_title("noise levels of a sampler")
  left.legend()
  right.set(xlabel="sigma", ylabel="density", xlim=(0, 1), ylim=0)
  right.set_title("noise levels of training")
  style.write_svg(made, directory / "noise_levels.svg")
