"""Noise levels of SANA-Sprint: angles on a circle."""

import pathlib

import numpy as np

from docs.figures import style
from sana_jax.diffusion import schedules


def draw(directory: pathlib.Path) -> None:
  """Draws the angles of 1, 2 and 4 steps, and the flow times they stand for."""
  made, (left, right) = style.figure(7.5, 3, columns=2)
  arc = np.linspace(0, np.pi / 2, 200)
  left.plot(np.cos(arc), np.sin(arc), color="#9e9e9e", linewidth=1)
  right.plot(arc, np.sin(arc) / (np.sin(arc) + np.cos(arc)), color="#9e9e9e")
  for steps in (1, 2, 4):
    schedule = schedules.SCM().schedule(
      steps, intermediate_timesteps=1.3 if steps == 2 else None
    )
    angles = np.append(schedule.timesteps, 0.0)
    radius = 1 + 0.06 * (steps - 1)
    label = f"{steps} step" + "s" * (steps > 1)
    left.plot(
      radius * np.cos(angles), radius * np.sin(angles), "o", label=label
    )
    right.plot(angles, schedule.sigmas, "o", label=label)
  left.set(xlabel="weight of the data", ylabel="weight of the noise")
  left.set(aspect="equal", xlim=(-0.1, 1.3), ylim=(-0.1, 1.3))
  left.legend()
  right.set(xlabel="angle s, radians", ylabel="flow time sigma")
  right.legend()
  style.write_svg(made, directory / "circle.svg")
