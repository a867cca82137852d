"""Whole images or not: decided once for each kind, and said in each image."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging

from sana_jax import pipeline as pipeline_lib
from sana_jax.bulk import plan as plan_lib
from sana_jax.models import tiling as tiling_lib
from sana_jax.models import windows as windows_lib
from sana_jax.pipeline import memory

NAME = "tiling"


class Decodings:
  """Plans the memory of batches, of those that are alike once.

  Args:
    candidates: of each image, which are a batch of their own; None: images
      share batches.
  """

  def __init__(
    self, pipe: pipeline_lib.SanaPipeline, candidates: int | None = None
  ):
    self._pipe = pipe
    self._candidates = candidates
    self._plans: dict[tuple[Any, ...], memory.Plan] = {}

  def plan(self, settings: Mapping[str, Any], size: int) -> memory.Plan:
    """Plans batches of `size` images.

    Raises:
      ValueError: they do not fit, or the pipeline's tiling has no effect.
    """
    key = (tuple(sorted(settings.items())), size, self._pipe.memory)
    if key not in self._plans:
      prompts, images = size, size
      if self._candidates is not None:
        prompts, images = 1, self._candidates
      changed = self._pipe.generation_config.replace(settings)
      self._plans[key] = self._pipe.plan_memory(prompts, images, changed)
    return self._plans[key]

  def check(self, kind: plan_lib.Kind) -> None:
    """Raises ValueError for images that cannot be made."""
    self.plan(dict(kind.settings), kind.size)

  def check_free(
    self, kinds: Iterable[plan_lib.Kind], free_bytes: int | None
  ) -> None:
    """Refuses to go on with less memory than a run was planned for.

    Raises:
      ValueError: says how much is needed.
    """
    if free_bytes is None:
      return
    for kind in kinds:
      planned = self.plan(dict(kind.settings), kind.size)
      if planned.peak > free_bytes:
        raise ValueError(
          f"The run began with more free memory: its images need "
          f"{planned.peak / 2**30:.1f} GiB as they were decoded so far, "
          f"{free_bytes / 2**30:.1f} GiB are free on each device. Free the "
          "rest, or begin anew in another --output_dir."
        )


def describe(cut: memory.Cut | None) -> dict[str, int] | None:
  """Returns windows or tiles as a JSON value; None: whole images."""
  return None if cut is None else dataclasses.asdict(cut)


def prescribe(
  pipe: pipeline_lib.SanaPipeline, description: Mapping[str, Any]
) -> None:
  """Has a pipeline decode as a described image was decoded.

  Raises:
    ValueError: the description says what cannot be.
  """
  if NAME not in description:
    return
  value = description[NAME]
  if value is None:
    pipe.memory = dataclasses.replace(pipe.memory, tile_sides=())
    return
  try:
    windows = "window_side" in value
    make = windows_lib.Windows if windows else tiling_lib.Tiling
    pipe.tiling = make(**value)
  except TypeError as error:
    raise ValueError(f"{NAME} is {value!r}, which is no tiling.") from error


def check_prescribed(
  ways: Decodings, made: plan_lib.Plan, description: Mapping[str, Any]
) -> None:
  """Warns of an image that was decoded whole and is decoded in windows now.

  Raises:
    ValueError: such an image does not fit, neither whole nor in windows.
  """
  if NAME not in description or description[NAME] is not None:
    return
  if made.problems:
    problem = made.problems[0]
    raise ValueError(
      f"{problem.origin} was decoded whole, not in tiles: {problem.reason}. "
      "With a small --vae_window it is the same up to rounding; with "
      "--vae_tile it is made in tiles, and differs."
    )
  for kind in made.kinds():
    cut = ways.plan(dict(kind.settings), kind.size).decoding.cut
    if cut is not None:
      logging.warning(
        "the image was decoded whole, and is decoded in %s now, for lack of "
        "memory: the same up to rounding",
        cut,
      )
