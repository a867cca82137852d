"""Processes with different luck plan the same batches, whatever their number."""

import json
import os
import pathlib
import socket
import subprocess
import sys

from tests import pictures

ROOT = pathlib.Path(__file__).parents[2]
# Prints a digest of every row of its part of the batches of some steps. The
# disk of process 1 never gives it the beginning of one picture.
SCRIPT = """
import hashlib, json, sys

import jax

from sana_jax import config as config_lib
from sana_jax.data import loader, opening
from sana_jax.data.sources import folder
from sana_jax.training import scans

path, directory, first, last, rank, count, port, trouble = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
if int(count) > 1:
  jax.distributed.initialize(f"localhost:{port}", int(count), int(rank))
if trouble != "none":
  read = folder.FolderSource.image_head

  def image_head(self, index, size):
    if self.file_name(index) == trouble and jax.process_index() == 1:
      raise OSError("disk on fire")
    return read(self, index, size)

  folder.FolderSource.image_head = image_head
opened = opening.open_pictures(
  config_lib.DataConfig(
    path=path, image_size=32, buckets="aspect", max_buckets=3, crop="random"
  ),
  multiple=4,
  tokenize=lambda texts: {},
  batch_size=6,
  seed=3,
  find_scan=scans.shared(directory),
)
batches = iter(
  opened.batches(loader.Host(int(rank), int(count), 0, 0), int(first))
)
for step in range(int(first), int(last)):
  rows = next(batches)["images"]
  digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in rows]
  print("BATCH", json.dumps([step, list(rows.shape[1:]), digests]))
print("USED", opened.reports[0].used)
"""


def start(*args):
  env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  return subprocess.Popen(
    [sys.executable, "-c", SCRIPT, *map(str, args)],
    cwd=ROOT,
    env=env,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def run(path, directory, steps, processes, trouble="none"):
  """Returns the digests of every step's batch, and the count of pictures."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  started = [
    start(path, directory, *steps, rank, processes, port, trouble)
    for rank in range(processes)
  ]
  batches, used = {}, set()
  for process in started:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-3000:]
    for line in out.splitlines():
      name, _, rest = line.partition(" ")
      if name == "BATCH":
        step, shape, digests = json.loads(rest)
        batches.setdefault(step, []).append((shape, digests))
      elif name == "USED":
        used.add(int(rest))
  whole = {}
  for step, parts in batches.items():
    assert all(shape == parts[0][0] for shape, _ in parts)
    whole[step] = (parts[0][0], [d for _, digests in parts for d in digests])
  return whole, used


def test_two_processes_read_what_one_would_before_and_after_a_restart(
  tmp_path, rng
):
  files = {}
  for number in range(34):
    shape = ((24, 32), (32, 32), (40, 20))[number % 3]
    image = pictures.picture(rng, *shape)
    files[f"{number:02d}.png"] = pictures.encode(image, "PNG")
  folder = pictures.write_folder(tmp_path / "pictures", files)
  # An epoch has 5 or 6 steps: the restart is in its middle.
  expected, used = run(folder, tmp_path / "one", (0, 9), 1)
  assert used == {34}
  before, _ = run(folder, tmp_path / "two", (0, 3), 2)
  after, _ = run(folder, tmp_path / "two", (3, 9), 2)
  assert before | after == expected
  assert len({tuple(shape) for shape, _ in expected.values()}) == 3


def test_what_one_process_cannot_read_none_takes(tmp_path, rng):
  files = {
    f"{number:02d}.png": pictures.encode(pictures.picture(rng), "PNG")
    for number in range(20)
  }
  folder = pictures.write_folder(tmp_path / "pictures", files)
  found, used = run(folder, tmp_path / "x", (0, 3), 2, trouble="15.png")
  assert used == {19}
  # One process that goes on with what they found out.
  again, used = run(folder, tmp_path / "x", (1, 3), 1)
  assert used == {19}
  assert again == {step: found[step] for step in (1, 2)}
