"""One scan of a source for all processes, kept for later starts.

Every process measures its share of the pictures, and all get the shares of all:
what a disk did not give to one of them is left out by all of them, so that they
plan the same batches. A restart reads the scan of before, if keys and files are
still the same: a run keeps its order. Files are known by their sizes and times,
as process 0 sees them; other processes may have copies.
"""

import dataclasses
import functools
import json
from collections.abc import Callable

import jax
import numpy as np
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from sana_jax.data import opening, records
from sana_jax.data import scan as scan_lib


def shared(directory: epath.PathLike | None) -> opening.ScanFn:
  """Returns a `scan.scan` that all processes call together.

  Args:
    directory: where scans are kept; None: nowhere.

  The result raises ValueError where processes see different sources.
  """

  def find(
    source: records.Source,
    *,
    num_threads: int,
    verify: bool,
    min_clip_score: float = 0.0,
  ) -> scan_lib.Scan:
    fingerprint = scan_lib.fingerprint(scan_lib.keys(source))
    _require_same(source, fingerprint)
    path = None
    if directory is not None:
      kind = "-verified" if verify else ""
      kind += f"-score-{min_clip_score:g}" if min_clip_score else ""
      path = epath.Path(directory) / f"{fingerprint[:16]}{kind}.npz"
    first = jax.process_index() == 0
    stamp = scan_lib.stamp(source, num_threads) if first else ""
    stamp = _exchange(stamp.encode())[0].decode()
    if (known := _known(path, source, stamp)) is not None:
      return known
    measure = functools.partial(
      scan_lib.scan,
      source,
      num_threads=num_threads,
      verify=verify,
      min_clip_score=min_clip_score,
    )
    return _measured(measure, len(source), path, stamp)

  return find


def _require_same(source: records.Source, fingerprint: str) -> None:
  ours = f"{len(source)} records, keys {fingerprint[:12]}"
  seen = [text.decode() for text in _exchange(ours.encode())]
  if len(set(seen)) > 1:
    raise ValueError(
      f"Processes see different files at {source.name}: {json.dumps(seen)}, in "
      "the order of the processes. Give all of them the same files."
    )


def _known(
  path: epath.Path | None, source: records.Source, stamp: str
) -> scan_lib.Scan | None:
  """Returns the scan that process 0 finds, of the files as they are."""
  content = b""
  if path is not None and jax.process_index() == 0 and path.exists():
    try:
      found = scan_lib.load(path, source)
      if found.stamp == stamp:
        content = found.to_bytes()
        logging.info("%s: sizes are known from %s", source.name, path)
      else:
        logging.warning(
          "scanning %s again: its files have changed", source.name
        )
    except ValueError as error:
      logging.warning("scanning %s again: %s", source.name, error)
  content = _exchange(content)[0]
  return scan_lib.Scan.from_bytes(content) if content else None


def _measured(
  measure: Callable[..., scan_lib.Scan],
  count: int,
  path: epath.Path | None,
  stamp: str,
) -> scan_lib.Scan:
  processes = jax.process_count()
  first, last = (
    place * count // processes
    for place in (jax.process_index(), jax.process_index() + 1)
  )
  share = measure(part=range(first, last))
  whole = scan_lib.join(
    [scan_lib.Scan.from_bytes(part) for part in _exchange(share.to_bytes())]
  )
  whole = dataclasses.replace(whole, stamp=stamp)
  if path is not None and jax.process_index() == 0:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path)
  return whole


def _exchange(content: bytes) -> list[bytes]:
  """Returns what every process gave, in their order."""
  if jax.process_count() == 1:
    return [content]
  sizes = multihost_utils.process_allgather(np.array([len(content)], np.int32))
  sizes = sizes.reshape(-1)
  if not sizes.any():
    return [b""] * len(sizes)
  padded = np.zeros(sizes.max(), np.uint8)
  padded[: len(content)] = np.frombuffer(content, np.uint8)
  rows = multihost_utils.process_allgather(padded)
  return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]
