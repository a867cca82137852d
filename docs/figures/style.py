"""How all figures look, and how they are written: the same bytes every time."""

import pathlib

import matplotlib as mpl
import matplotlib.figure
from matplotlib import pyplot as plt

COLOURS = ("#00796b", "#e64a19", "#3949ab", "#c09000", "#6d4c41", "#546e7a")

mpl.use("Agg")
mpl.rcParams.update(
  {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.dpi": 100,
    "font.size": 9.5,
    "grid.color": "#e0e0e0",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    # Names of elements, and letters as outlines: no font decides anything.
    "svg.fonttype": "path",
    "svg.hashsalt": "sana_jax",
  }
)


def figure(
  width: float, height: float, columns: int = 1
) -> tuple[matplotlib.figure.Figure, list[plt.Axes]]:
  """Returns a figure of so many inches, and its panels side by side."""
  made, panels = plt.subplots(1, columns, figsize=(width, height))
  return made, list(panels) if columns > 1 else [panels]


def write_svg(made: matplotlib.figure.Figure, path: pathlib.Path) -> None:
  made.savefig(path, format="svg", metadata={"Date": None})
  plt.close(made)


def write_png(
  made: matplotlib.figure.Figure, path: pathlib.Path, dpi: int = 100
) -> None:
  made.savefig(path, format="png", dpi=dpi, metadata={"Software": None})
  plt.close(made)
