"""Names of the records of a step's batch: what to look at when it is bad."""

from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from sana_jax.data import sampler as sampler_lib

NameBatch = Callable[[int], list[str]]
"""A step -> "source: key" of the records of its global batch, in order."""


def of_plans(
  plans: sampler_lib.BatchSampler, sources: Sequence[Any]
) -> NameBatch:
  """Names what a sampler plans.

  Args:
    sources: records with a `key`, in the order of the sampler's.
  """

  def name(step: int) -> list[str]:
    plan = plans.batch(step)
    names = [""] * len(plan.index)
    for number in np.unique(plan.source):
      rows = np.flatnonzero(plan.source == number)
      source = sources[number]
      records = source.__getitems__([int(i) for i in plan.index[rows]])
      for row, record in zip(rows, records, strict=True):
        names[row] = f"{source.name}: {record.key}"
    return names

  return name


def of_examples(dataset: grain.MapDataset, batch_size: int) -> NameBatch:
  """Names what `loader.example_batches` makes of a dataset.

  Args:
    dataset: names, shuffled and repeated as the examples are.
  """

  def name(step: int) -> list[str]:
    start = step * batch_size
    return [str(dataset[i]) for i in range(start, start + batch_size)]

  return name
