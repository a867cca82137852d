"""Prints what one process reads of the batches of some steps, as digests.

python -m tests.host_batches PICTURES DIRECTORY FIRST LAST RANK COUNT PORT BAD

BAD: the picture whose beginning the disk of process 1 never gives; "none".
"""

import hashlib
import json
import sys

import jax

from sana_jax import config as config_lib
from sana_jax.data import loader, opening
from sana_jax.data.sources import folder
from sana_jax.training import scans


def digests(pictures, directory, first, last, rank=0, count=1):
  """Returns (step, shape, digests of the rows) of steps, and what is used."""
  opened = opening.open_pictures(
    config_lib.DataConfig(
      path=str(pictures),
      image_size=32,
      buckets="aspect",
      max_buckets=3,
      crop="random",
    ),
    multiple=4,
    tokenize=lambda texts: {},
    batch_size=6,
    seed=3,
    find_scan=scans.shared(directory),
  )
  batches = iter(opened.batches(loader.Host(rank, count, 0, 0), first))
  found = []
  for step in range(first, last):
    rows = next(batches)["images"]
    hashes = [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]
    found.append([step, list(rows.shape[1:]), hashes])
  return found, opened.reports[0].used


def _break(bad: str) -> None:
  read = folder.FolderSource.image_head

  def image_head(self, index, size):
    if self.file_name(index) == bad and jax.process_index() == 1:
      raise OSError("disk on fire")
    return read(self, index, size)

  folder.FolderSource.image_head = image_head


def main(pictures, directory, first, last, rank, count, port, bad):
  jax.config.update("jax_platforms", "cpu")
  if int(count) > 1:
    jax.distributed.initialize(f"localhost:{port}", int(count), int(rank))
  if bad != "none":
    _break(bad)
  numbers = map(int, (first, last, rank, count))
  sys.stdout.write(json.dumps(digests(pictures, directory, *numbers)))


if __name__ == "__main__":
  main(*sys.argv[1:])
