"""A cache from its source to its manifest: begins or continues it."""

import contextlib
import hashlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging

from sana_jax import storage, termination
from sana_jax.data import buckets, cache_manifest, records
from sana_jax.data import scan as scan_lib
from sana_jax.data.sources import access
from sana_jax.pipeline import meter as meter_lib
from sana_jax.precompute import encoders as encoders_lib
from sana_jax.precompute import finalise as finalise_lib
from sana_jax.precompute import plan as plan_lib
from sana_jax.precompute import shards
from sana_jax.precompute import task as task_lib

# Training may crop at random; what is made once is cropped once.
_CROP = "center"


class Prepared(NamedTuple):
  """A task that has been looked into."""

  maker: shards.Maker
  run: finalise_lib.Run


class Outcome(NamedTuple):
  """How a run ended.

  Attributes:
    completed: None: other hosts are not finished, or `stopped`.
    skipped: how many pictures of this host's shards were.
    stopped: SIGTERM came before all was made.
  """

  completed: finalise_lib.Completed | None
  skipped: int
  stopped: bool


def prepare(task: task_lib.Task) -> Prepared:
  """Opens and scans the source, loads the models, and makes the plan.

  Raises:
    FileNotFoundError: something is missing.
    ValueError: something is unreadable, cannot be, or does not fit.
  """
  source = task.open_source()
  logging.info("reading the sizes of %d pictures", len(source))
  if unread := access.describe_unread(source):
    logging.warning("%s", unread)
  scan = scan_lib.scan(
    source, num_threads=task.num_threads, min_clip_score=task.min_clip_score
  )
  problems = {i: p for i, p in enumerate(scan.problem) if p is not None}
  sizes = buckets.Sizes(source.name, scan.height, scan.width, problems)
  fingerprint = _fingerprint(scan, task.min_clip_score)
  return assemble(task, source, sizes, fingerprint, task.load_encoders())


def _fingerprint(scan: scan_lib.Scan, min_clip_score: float) -> str:
  """Returns a digest of what the plan depends on: keys, sizes, least score."""
  digest = hashlib.sha256(scan.fingerprint.encode())
  for sizes in (scan.height, scan.width):
    digest.update(np.ascontiguousarray(sizes, "<i4").tobytes())
  if min_clip_score:
    digest.update(np.array(min_clip_score, "<f8").tobytes())
  return digest.hexdigest()


def assemble(
  task: task_lib.Task,
  source: records.Source,
  sizes: buckets.Sizes,
  fingerprint: str,
  encoders: encoders_lib.Encoders,
) -> Prepared:
  """Makes the plan for a source whose sizes are known.

  Args:
    fingerprint: of the source.

  Raises:
    ValueError: something cannot be, or no picture can be used.
  """
  plan = plan_lib.make_plan(
    sizes,
    kind=task.buckets,
    image_size=task.image_size,
    multiple=encoders.autoencoder_config.spatial_compression,
    max_buckets=task.max_buckets,
    min_pictures=task.min_pictures,
    records_per_shard=task.records_per_shard,
    batch_size=task.batch_size,
  )
  settings = cache_manifest.Settings(
    image_size=task.image_size,
    buckets=plan.shapes,
    crop=_CROP,
    resample=task.filter,
    records_per_shard=task.records_per_shard,
    source_fingerprint=fingerprint,
    **encoders.identity,
  )
  run = finalise_lib.Run(
    settings=settings,
    num_shards=plan.num_shards,
    source=source.name,
    checkpoint=encoders.checkpoint,
  )
  return Prepared(shards.Maker(source, plan, encoders, settings), run)


def run(
  prepared: Prepared,
  output: pathlib.Path,
  *,
  num_hosts: int = 1,
  host_index: int = 0,
  started: float,
) -> Outcome:
  """Makes this host's shards, those that are missing, and what completes all.

  Args:
    started: when the program began, by time.monotonic.

  Raises:
    FileExistsError: the directory holds another cache.
    BlockingIOError: another process is this host.
    OSError: something cannot be written.
    ValueError: there is no such host.
  """
  maker = prepared.maker
  numbers = plan_lib.shards_of_host(
    prepared.run.num_shards, host_index, num_hosts
  )
  directory = storage.Directory(output, host_index)
  prepared.run.claim(directory)
  lock = storage.open_alone(
    output / f".lock-{host_index:05d}", "wait for it, or end it"
  )
  with lock, termination.sigterm_event() as stop:
    directory.remove_temporary_files()
    skipped = _make_missing(maker, numbers, directory, started, stop.is_set)
  if skipped is None:
    logging.info("stopped by SIGTERM; the same command goes on from here")
    return Outcome(None, 0, stopped=True)
  try:
    completed = finalise_lib.finalise(directory)
  except finalise_lib.UnfinishedError as error:
    logging.info("this host is done; %s", error)
    return Outcome(None, skipped, stopped=False)
  logging.info("%s", finalise_lib.describe(completed.manifest))
  return Outcome(completed, skipped, stopped=False)


def _make_missing(
  maker: shards.Maker,
  numbers: range,
  directory: storage.Directory,
  started: float,
  stopped: Callable[[], bool],
) -> int | None:
  """Returns how many pictures were skipped; None: told to stop before all."""
  plan = maker.plan
  there = {number: maker.find(number, directory.path) for number in numbers}
  missing = [number for number, found in there.items() if found is None]
  skipped = [found.shard.skipped for found in there.values() if found]
  if skipped:
    logging.info("%d of %d shards are there already", len(skipped), len(there))
  meter = meter_lib.Meter(
    sum(len(plan.indices(number)) for number in numbers),
    sum(len(plan.indices(n)) for n, found in there.items() if found),
    started,
  )
  maker.encoders.progress = meter.event
  maker = maker._replace(on_batch=meter.batch_done)
  with contextlib.closing(meter):
    for number in missing:
      if stopped():
        return None
      finished = maker.make(number, directory)
      skipped.append(finished.shard.skipped)
      for key, why in finished.shard.skipped.items():
        logging.warning("skipped %s: %s", key, why)
  if missing:
    logging.info("%s", meter.summary())
  return sum(map(len, skipped))
