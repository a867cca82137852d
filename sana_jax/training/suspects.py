"""Which records a bad step was made of."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from sana_jax.data import loader, names


class Suspects(NamedTuple):
  """The records of a batch.

  Attributes:
    records: all of them; empty: the recipe cannot tell.
    broken: those whose own numbers are not finite.
  """

  records: list[str]
  broken: list[str]


def find(
  name_batch: names.NameBatch | None,
  batches: loader.HostBatches,
  host: loader.Host,
  step: int,
) -> Suspects:
  """Reads the batch of a step again and looks at it; all processes must call.

  Args:
    step: of the data, from 0 on.
  """
  records = name_batch(step) if name_batch is not None else []
  rows = _broken_rows(next(iter(batches(host, step))))
  if host.processes > 1:
    rows = multihost_utils.process_allgather(rows, tiled=True)
  broken = [
    records[row] if records else f"row {row}" for row in np.flatnonzero(rows)
  ]
  return Suspects(records, broken)


def shorten(records: list[str], count: int = 8) -> str:
  """Lists the first records of a batch."""
  more = f" and {len(records) - count} more" if len(records) > count else ""
  return ", ".join(records[:count]) + more or "records without names"


def _broken_rows(batch: loader.Batch) -> np.ndarray:
  """Marks the rows in which some float is not finite."""
  leaves = jax.tree.leaves(batch)
  broken = np.zeros(len(leaves[0]), bool)
  for leaf in leaves:
    # Those of ml_dtypes, too.
    if jnp.issubdtype(leaf.dtype, jnp.floating):
      values = leaf.astype(np.float32).reshape(len(leaf), -1)
      broken |= ~np.isfinite(values).all(axis=1)
  return broken
