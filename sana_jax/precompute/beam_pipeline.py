"""The same shards as the command's, made by Apache Beam's workers."""

import dataclasses
import pathlib
import uuid
from collections.abc import Iterator

import apache_beam as beam
from absl import logging
from apache_beam.options import pipeline_options

from sana_jax import storage
from sana_jax.data import cache_manifest
from sana_jax.precompute import finalise, job, plan, shards, task

_OWNER = "beam"


class MakeShard(beam.DoFn):
  """Makes the shard of a number; the models are loaded once per worker.

  Args:
    what: see `task.Task`.
    planned: the scan need not be repeated by every worker.
    settings: those of the run.
  """

  def __init__(
    self,
    what: task.Task,
    planned: plan.Plan,
    settings: cache_manifest.Settings,
    output: str,
  ):
    self._task = what
    self._plan = planned
    self._settings = settings
    self._output = output

  def setup(self) -> None:
    # A shard that two workers make at once has two temporary files.
    owner = f"{_OWNER}-{uuid.uuid4().hex}"
    self._directory = storage.Directory(pathlib.Path(self._output), owner)
    source = self._task.open_source()
    if len(source) != self._plan.num_records:
      raise ValueError(
        f"{source.name} has {len(source)} records for this worker, "
        f"{self._plan.num_records} where the pipeline was started; all must "
        "see the same files."
      )
    encoders = self._task.load_encoders()
    own = dataclasses.replace(self._settings, **encoders.identity)
    if own != self._settings:
      raise ValueError(
        f"{self._task.checkpoint} holds other models for this worker than "
        "where the pipeline was started; all must see the same files."
      )
    self._maker = shards.Maker(source, self._plan, encoders, self._settings)

  def process(self, number: int) -> Iterator[tuple[int, int]]:
    """Yields the number of the shard, and how many pictures it lacks."""
    finished = self._maker.make(number, self._directory)
    yield number, len(finished.shard.skipped)

  def teardown(self) -> None:
    self._directory.remove_temporary_files()


def run(
  what: task.Task,
  output: pathlib.Path,
  options: pipeline_options.PipelineOptions,
) -> finalise.Completed:
  """Makes the shards that are missing, and completes the cache.

  Raises:
    FileExistsError: the directory holds another cache.
    FileNotFoundError: something is missing, such as shards when the pipeline
      ended without an error.
    ValueError: something is unreadable, cannot be, or does not fit.
  """
  prepared = job.prepare(what)
  directory = storage.Directory(output, _OWNER)
  prepared.run.claim(directory)
  planned = prepared.maker.plan
  missing = [
    number
    for number in range(planned.num_shards)
    if prepared.maker.find(number, output) is None
  ]
  logging.info("%d of %d shards to make", len(missing), planned.num_shards)
  if missing:
    with beam.Pipeline(options=options) as pipeline:
      _ = (
        pipeline
        | "Shards" >> beam.Create(missing)
        # Otherwise one worker may get them all.
        | "Spread" >> beam.Reshuffle()
        | "Make"
        >> beam.ParDo(
          MakeShard(what, planned, prepared.run.settings, str(output))
        )
      )
  completed = finalise.finalise(directory)
  # Of workers that died, whoever they were: all is made by now.
  directory.remove_temporary_files()
  return completed
