"""Processes of different luck plan the same batches, whatever their number."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from tests import host_batches, pictures

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 8


def start(paths, directory, steps, bad="none"):
  """Starts a process for every path."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  return [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "tests.host_batches", path, directory),
        *map(str, (*steps, rank, len(paths), port, bad)),
      ],
      cwd=ROOT,
      env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for rank, path in enumerate(paths)
  ]


def run(path, directory, steps, processes, bad="none"):
  """Returns (shape, digests of all rows) by step, and the count of pictures."""
  parts = []
  for process in start([path] * processes, directory, steps, bad):
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err[-3000:]
    # Before it are lines of the collectives' library.
    parts.append(json.loads(out.splitlines()[-1]))
  assert len({used for _, used in parts}) == 1
  return joined([found for found, _ in parts]), parts[0][1]


def joined(parts):
  whole = {}
  for rows in zip(*parts, strict=True):
    step, shape, _ = rows[0]
    assert all(row[:2] == [step, shape] for row in rows)
    whole[step] = (shape, [digest for row in rows for digest in row[2]])
  return whole


@pytest.fixture
def folder(tmp_path, rng):
  files = {}
  for number in range(34):
    shape = ((24, 32), (32, 32), (40, 20))[number % 3]
    image = pictures.picture(rng, *shape)
    files[f"{number:02d}.png"] = pictures.encode(image, "PNG")
  return pictures.write_folder(tmp_path / "pictures", files)


@pytest.mark.slow
def test_what_one_process_cannot_read_none_takes_not_even_after_a_restart(
  folder, tmp_path
):
  scans = tmp_path / "scans"
  # Number 31 is in the share of process 1. An epoch has 5 or 6 steps.
  before, used = run(folder, scans, (0, 3), 2, bad="31.png")
  assert used == 33
  after, used = run(folder, scans, (3, STEPS), 1)
  assert used == 33
  found, used = host_batches.digests(folder, scans, 0, STEPS)
  assert used == 33
  assert before | after == joined([found])
  assert len({tuple(shape) for shape, _ in after.values()}) > 1


@pytest.mark.slow
def test_two_processes_read_what_one_would_before_and_after_a_restart(
  folder, tmp_path
):
  found, used = host_batches.digests(folder, tmp_path / "one", 0, STEPS)
  assert used == 34
  before, _ = run(folder, tmp_path / "two", (0, 3), 2)
  after, _ = run(folder, tmp_path / "two", (3, STEPS), 2)
  assert before | after == joined([found])


@pytest.mark.slow
def test_processes_that_see_other_files_are_refused(folder, tmp_path):
  other = tmp_path / "other"
  other.mkdir()
  (other / "a.png").write_bytes((folder / "01.png").read_bytes())
  started = start([folder, other], tmp_path / "scans", (0, 1))
  for process in started:
    _, error = process.communicate(timeout=180)
    assert "Processes see different files" in error
    assert "34 records" in error
    assert process.returncode
