"""A run from its plan to its files: begins or continues it, and reports."""

import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import tqdm
from absl import logging

from sana_jax import pipeline as pipeline_lib
from sana_jax import storage, termination
from sana_jax.bulk import (
  contact_sheet,
  decodings,
  history,
  manifest,
  plan,
  requests,
  runner,
  sinks,
)
from sana_jax.pipeline import meter

# Newer software, or another machine, may continue a run.
_FREE = frozenset({"device", "jax", "sana_jax"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
  """Where images go, and which of several hosts this is.

  Attributes:
    format: one of `sinks.FORMATS`.
    grid: write a picture of all images, too.
    overwrite: remove the files of the run that is there, and begin.
  """

  path: pathlib.Path
  format: str = "png"
  grid: bool = False
  overwrite: bool = False
  num_hosts: int = 1
  host_index: int = 0


class Outcome(NamedTuple):
  """How a run ended.

  Attributes:
    failed: numbers of the images that could not be made.
    stopped: SIGTERM came before all was made.
  """

  failed: list[int]
  stopped: bool


class Prepared(NamedTuple):
  """A run, or the rest of one, that can begin.

  Attributes:
    available_bytes: on each device, that it was planned with.
  """

  images: plan.Plan
  decodings: decodings.Decodings
  available_bytes: int | None


def prepare(
  pipe: pipeline_lib.SanaPipeline,
  items: Sequence[requests.Item],
  output: Output,
  selection: runner.Selection | None = None,
  **numbers: int,
) -> Prepared:
  """Plans a run, or the rest of the one whose files are there.

  Problems take the place of requests that do not fit into memory.

  Args:
    **numbers: see `plan.make_plan`.

  Raises:
    FileExistsError: the directory holds something else.
    ValueError: what cannot be.
  """
  run = None
  if not output.overwrite:
    run = manifest.read_run(storage.Directory(output.path, output.host_index))
  past = None if run is None else history.History.read(run)
  free = history.free_bytes(pipe)
  available = free if past is None else past.available_bytes
  history.fix_memory(pipe, available)
  ways = decodings.Decodings(
    pipe, None if selection is None else selection.count
  )
  images = history.make_plan(items, ways.check, past, **numbers)
  if past is not None:
    ways.check_free(images.kinds(), free)
  return Prepared(images, ways, available)


def make(
  pipe: pipeline_lib.SanaPipeline,
  prepared: Prepared,
  output: Output,
  description: Mapping[str, Any],
  started: float,
  selection: runner.Selection | None = None,
) -> Outcome:
  """Makes this host's images, those that are missing.

  The paths of finished files go to the standard output.

  Args:
    description: see `metadata.describe_run`.
    started: when the program began, by time.monotonic.
    selection: keeps the best of several candidates; None: there is one.

  Raises:
    ValueError: what cannot be.
    OSError: the directory holds something else, or cannot be written.
  """
  images = prepared.images
  plan.units_of_host(images.num_units, output.host_index, output.num_hosts)
  if output.grid:
    contact_sheet.check(
      pipe, images, output_format=output.format, num_hosts=output.num_hosts
    )
  directory = storage.Directory(output.path, output.host_index)
  run = manifest.claim(
    directory,
    identity(pipe, images, output, description),
    start=history.start(images, prepared.available_bytes),
    repairs=history.repairs(images),
    new_files=_new_files(images, output),
    overwrite=output.overwrite,
  )
  # Of several hosts that began together, one was first.
  history.fix_memory(pipe, history.History.read(run).available_bytes)
  with manifest.Manifest(
    directory,
    images,
    host_index=output.host_index,
    num_hosts=output.num_hosts,
  ) as finished:
    failed = _make_missing(
      pipe,
      prepared,
      output,
      description,
      meter.Meter(*finished.count(), started),
      directory,
      finished,
      selection,
    )
    stopped = bool(finished.units_to_do)
    if stopped:
      logging.info("stopped by SIGTERM; the same command goes on from here")
    elif output.grid:
      contact_sheet.write(directory, images, description)
      _print_paths(directory, [manifest.GRID])
  return Outcome(failed, stopped)


def identity(
  pipe: pipeline_lib.SanaPipeline,
  images: plan.Plan,
  output: Output,
  description: Mapping[str, Any],
) -> dict[str, Any]:
  """Collects what a restart must have in common with what it continues."""
  return {
    "images": images.num_images,
    "requests_sha256": images.fingerprint(),
    "seed": images.seed,
    "batch_size": images.batch_size,
    "output_format": output.format,
    "images_per_unit": images.images_per_unit,
    "num_hosts": output.num_hosts,
    "generation_config": pipe.generation_config.to_dict(),
    **{name: v for name, v in description.items() if name not in _FREE},
  }


def _make_missing(
  pipe: pipeline_lib.SanaPipeline,
  prepared: Prepared,
  output: Output,
  description: Mapping[str, Any],
  measured: meter.Meter,
  directory: storage.Directory,
  finished: manifest.Manifest,
  selection: runner.Selection | None,
) -> list[int]:
  """Makes what the manifest lacks; returns the images that failed."""
  total, done = finished.count()
  if done:
    logging.info("%d of %d images are there already", done, total)
  images = prepared.images
  with (
    termination.sigterm_event() as stop,
    contextlib.closing(measured),
  ):
    failed = runner.Runner(
      plan=images,
      pipe=pipe,
      sink=sinks.make_sink(
        output.format,
        directory,
        num_images=images.num_images,
        unit_name=images.unit_name,
      ),
      manifest=finished,
      meter=measured,
      description=description,
      decodings=prepared.decodings,
      selection=selection,
      stop=stop.is_set,
      on_unit=lambda names: _print_paths(directory, names),
    ).run()
  logging.info("%s", measured.summary())
  if failed:
    logging.error("%d images failed: %s", len(failed), failed)
  return failed


def _new_files(images: plan.Plan, output: Output) -> Sequence[str]:
  """Names the PNG files that a new run must not find in its directory."""
  if output.format != "png":
    return []
  names = [
    sinks.png_name(image.index, image.prompt, images.num_images)
    for image in images.images()
  ]
  return [*names, manifest.GRID] if output.grid else names


def _print_paths(directory: storage.Directory, names: Sequence[str]) -> None:
  lines = "".join(f"{directory.path / name}\n" for name in names)
  # In a terminal, above the progress bar.
  tqdm.tqdm.write(lines, file=sys.stdout, end="")
  sys.stdout.flush()
