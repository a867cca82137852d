"""Draws all figures of the documentation: python -m docs.figures.

They are made by this package's own functions, and are the same bytes every
time with the same libraries; docs/images has them.
"""

import argparse
import pathlib

from docs.figures import (
  circle,
  cost,
  diagram,
  noise_levels,
  pictures,
  plans,
)

IMAGES = pathlib.Path(__file__).parents[1] / "images"
_FIGURES = (circle, cost, diagram, noise_levels, pictures, plans)


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m docs.figures", description=__doc__
  )
  parser.add_argument("--output", type=pathlib.Path, default=IMAGES)
  output = parser.parse_args().output
  output.mkdir(parents=True, exist_ok=True)
  for figure in _FIGURES:
    figure.draw(output)


if __name__ == "__main__":
  main()
