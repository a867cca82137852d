"""From a config to batches: sources opened, scanned, sorted and planned."""

from typing import NamedTuple

import numpy as np
from absl import logging

from sana_jax import config as config_lib
from sana_jax import resolution
from sana_jax.data import (
  buckets,
  captions,
  filtering,
  loader,
  readers,
  records,
  sampler,
  scan,
  sources,
)
from sana_jax.data import cache as cache_lib


class Opened(NamedTuple):
  """Batches, and the shapes they may have.

  Attributes:
    shapes: (height, width) of pictures in pixels.
    reports: what of each source is used.
  """

  batches: loader.HostBatches
  shapes: tuple[buckets.Shape, ...]
  reports: tuple[buckets.EpochReport, ...]


def open_pictures(
  config: config_lib.DataConfig,
  *,
  multiple: int,
  tokenize: readers.TokenizeFn,
  batch_size: int,
  seed: int,
) -> Opened:
  """Opens sources of pictures; see `readers.PictureReader` for the batches.

  Logs what of each is used, and what an epoch consists of.

  Args:
    multiple: what heights and widths must be multiples of.
    batch_size: of all hosts together.

  Raises:
    FileNotFoundError: a source is not there.
    ValueError: a source cannot be read, or nothing of it be used.
  """
  opened = [
    sources.open_source(place.path, kind=place.kind, split=place.split)
    for place in config.places
  ]
  bucketing = buckets.sort(
    [_sizes(source, config) for source in opened],
    [place.weight for place in config.places],
    buckets.table(config.buckets, config.image_size, multiple),
    config.max_buckets,
  )
  reader = readers.PictureReader(
    opened,
    bucketing.shapes,
    _selection(config),
    tokenize,
    crop=config.crop,
    flip=config.random_flip,
    resample=resolution.reference_filter(config.image_size),
  )
  return _planned(bucketing, reader, batch_size, seed)


def open_cache(
  source: cache_lib.CachedSource,
  config: config_lib.DataConfig,
  *,
  batch_size: int,
  seed: int,
) -> Opened:
  """Plans batches of a cache; see `readers.CacheReader` for them.

  Raises:
    ValueError: it has no text states, or more shapes than
      `config.max_buckets`.
  """
  shapes = np.array(source.manifest.settings.buckets)[source.buckets]
  sizes = buckets.Sizes(source.name, shapes[:, 0], shapes[:, 1], {})
  bucketing = buckets.group([sizes], [1.0], config.max_buckets)
  skipped = source.manifest.skipped
  if skipped:
    logging.warning(
      "%s: %d pictures were skipped when it was made, such as %s; its manifest "
      "says why",
      *(source.name, len(skipped), next(iter(skipped.items()))),
    )
  reader = readers.CacheReader(source, _selection(config))
  return _planned(bucketing, reader, batch_size, seed)


def _planned(
  bucketing: buckets.Bucketing,
  reader: loader.ReadFn,
  batch_size: int,
  seed: int,
) -> Opened:
  plans = sampler.BatchSampler(bucketing.populations, batch_size, seed)
  for line in buckets.describe(bucketing, plans):
    logging.info("%s", line)
  batches = loader.planned_batches(plans, batch_size, reader)
  return Opened(batches, bucketing.shapes, bucketing.reports)


def _sizes(
  source: records.Source, config: config_lib.DataConfig
) -> buckets.Sizes:
  found = scan.scan(
    source, num_threads=max(config.num_threads, 1), verify=config.verify
  )
  problems = filtering.low_scores(
    source, config.min_clip_score, num_threads=max(config.num_threads, 1)
  )
  problems |= {i: p for i, p in enumerate(found.problem) if p is not None}
  return buckets.Sizes(source.name, found.height, found.width, problems)


def _selection(config: config_lib.DataConfig) -> captions.CaptionSelection:
  return captions.CaptionSelection(
    method=config.caption_method,
    temperature=config.caption_temperature,
    threshold=config.caption_threshold,
    proportions=dict(config.caption_proportions),
  )
