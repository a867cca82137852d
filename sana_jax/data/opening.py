"""From a config to batches: sources opened, scanned, sorted and planned."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from sana_jax import config as config_lib
from sana_jax import resolution
from sana_jax.data import (
  buckets,
  captions,
  loader,
  names,
  readers,
  records,
  sampler,
  scan,
  sources,
)
from sana_jax.data import cache as cache_lib
from sana_jax.data.sources import access

# In an identity: other files, if nothing else differs, are no other batches.
STAMP = "files"

ScanFn = Callable[..., scan.Scan]
"""(source, num_threads=, verify=, min_clip_score=), as `scan.scan`."""


class Opened(NamedTuple):
  """Batches, and the shapes they may have.

  Attributes:
    shapes: (height, width) of pictures in pixels.
    reports: what of each source is used.
    name_batch: see `names.NameBatch`.
    plans: which records are in a batch.
    identities: by source, values that tell whether batches are still the same.
  """

  batches: loader.HostBatches
  shapes: tuple[buckets.Shape, ...]
  reports: tuple[buckets.EpochReport, ...]
  name_batch: names.NameBatch
  plans: sampler.BatchSampler
  identities: tuple[dict[str, Any], ...]


def open_pictures(
  config: config_lib.DataConfig,
  *,
  multiple: int,
  tokenize: readers.TokenizeFn,
  batch_size: int,
  seed: int,
  find_scan: ScanFn = scan.scan,
) -> Opened:
  """Opens sources of pictures; see `readers.PictureReader` for the batches.

  Logs what of each is used, and what an epoch consists of.

  Args:
    multiple: what heights and widths must be multiples of.
    batch_size: of all hosts together.
    find_scan: what measures a source; hosts must find the same.

  Raises:
    FileNotFoundError: a source is not there.
    ValueError: a source cannot be read, or nothing of it be used.
  """
  opened = [
    sources.open_source(place.path, kind=place.kind, split=place.split)
    for place in config.places
  ]
  scans = [
    find_scan(
      source,
      num_threads=max(config.num_threads, 1),
      verify=config.verify,
      min_clip_score=config.min_clip_score,
    )
    for source in opened
  ]
  for unread in filter(None, map(access.describe_unread, opened)):
    logging.warning("%s", unread)
  bucketing = buckets.sort(
    [_sizes(*pair) for pair in zip(opened, scans, strict=True)],
    [place.weight for place in config.places],
    buckets.table(config.buckets or "square", config.image_size, multiple),
    config.max_buckets,
    least=batch_size,
  )
  reader = readers.PictureReader(
    opened,
    bucketing.shapes,
    _selection(config),
    tokenize,
    crop=config.crop,
    flip=config.random_flip,
    resample=resample_filter(config),
  )
  identities = [
    {"keys": found.fingerprint, STAMP: found.stamp} for found in scans
  ]
  return _planned(bucketing, reader, opened, identities, batch_size, seed)


def open_cache(
  source: cache_lib.CachedSource,
  config: config_lib.DataConfig,
  *,
  batch_size: int,
  seed: int,
  tokenize: readers.TokenizeFn | None = None,
) -> Opened:
  """Plans batches of a cache; see `readers.CacheReader` for them.

  Warns of shapes of fewer pictures than a batch, whose batches repeat them.

  Args:
    tokenize: makes batches those of `readers.LatentReader`.

  Raises:
    ValueError: it has more shapes than `config.max_buckets`, or neither text
      states nor `tokenize`.
  """
  shapes = np.array(source.manifest.settings.buckets)[source.buckets]
  sizes = buckets.Sizes(
    *(source.name, shapes[:, 0], shapes[:, 1], {}),
    key=lambda index: source[index].key,
  )
  bucketing = buckets.group([sizes], [1.0], config.max_buckets)
  _warn_of_repeats(source.name, bucketing, batch_size)
  report = bucketing.reports[0].with_skipped(source.manifest.skipped)
  bucketing = dataclasses.replace(bucketing, reports=(report,))
  selection = _selection(config)
  if tokenize is None:
    source.null_caption()  # Raises where there are no states.
    reader: loader.ReadFn = readers.CacheReader(source, selection)
  else:
    reader = readers.LatentReader(source, selection, tokenize)
  return _planned(
    bucketing, reader, [source], [source.manifest.identity()], batch_size, seed
  )


def _warn_of_repeats(
  name: str, bucketing: buckets.Bucketing, batch_size: int
) -> None:
  few = buckets.repeating(bucketing, batch_size)
  if not few:
    return
  remedies = "a smaller batch_size"
  if len(bucketing.shapes) > 1:
    remedies += (
      f", or another cache by sana_jax.precompute --min_pictures={batch_size}, "
      "or by its --buckets=square"
    )
  logging.warning(
    "%s: %d of %d pictures are of shapes of fewer than a batch of %d (%s). "
    "Batches of these repeat pictures, of one pass after the other. Remedies: "
    "%s.",
    *(name, sum(few.values()), bucketing.reports[0].used, batch_size),
    ", ".join(f"{h}x{w}: {count}" for (h, w), count in few.items()),
    remedies,
  )


def resample_filter(config: config_lib.DataConfig) -> str:
  """Returns the filter that pictures are scaled with."""
  if config.resample != "auto":
    return config.resample
  return resolution.reference_filter(config.image_size)


def _planned(
  bucketing: buckets.Bucketing,
  reader: loader.ReadFn,
  opened: Sequence[records.Source | cache_lib.CachedSource],
  identities: Sequence[dict[str, Any]],
  batch_size: int,
  seed: int,
) -> Opened:
  plans = sampler.BatchSampler(bucketing.populations, batch_size, seed)
  for line in buckets.describe(bucketing, plans):
    logging.info("%s", line)
  return Opened(
    loader.planned_batches(plans, batch_size, reader),
    bucketing.shapes,
    bucketing.reports,
    names.of_plans(plans, opened),
    plans,
    tuple(
      {
        "records": report.read,
        "used": report.used,
        **identity,
        "order": buckets.digest(population),
        "shapes": [list(shape) for shape in bucketing.shapes],
      }
      for report, population, identity in zip(
        bucketing.reports, bucketing.populations, identities, strict=True
      )
    ),
  )


def _sizes(source: records.Source, found: scan.Scan) -> buckets.Sizes:
  problems = {i: p for i, p in enumerate(found.problem) if p is not None}
  keys = (
    {i: key for i, key in enumerate(scan.keys(source)) if i in problems}
    if problems
    else {}
  )
  return buckets.Sizes(
    *(source.name, found.height, found.width, problems), key=keys.__getitem__
  )


def _selection(config: config_lib.DataConfig) -> captions.CaptionSelection:
  return captions.CaptionSelection(
    method=config.caption_method,
    temperature=config.caption_temperature,
    threshold=config.caption_threshold,
    proportions=dict(config.caption_proportions),
  )
