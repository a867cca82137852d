"""Runs of the command that are killed, divided, and filled disks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sana_jax.data import cache
from tests import tiny
from tests.precompute import sources

pytestmark = pytest.mark.slow

COUNT = 120
BROKEN = (7, 40)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  tokenizer = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(tokenizer)
  path = tmp_path_factory.mktemp("checkpoint")
  tiny.make_pipeline(tokenizer).save_pretrained(path)
  return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """A folder of pictures of four sizes with texts; two are broken."""
  path = tmp_path_factory.mktemp("pictures")
  rng = np.random.default_rng(0)
  for index in range(COUNT):
    image = sources.png(rng, *sources.SHAPES[index % 4])
    if index in BROKEN:
      image = image[: len(image) // 2] if index == 7 else b"no picture"
    (path / f"p{index:03d}.png").write_bytes(image)
    caption = f"{tiny.CAPTIONS[index % 3]} {index % 17}"
    (path / f"p{index:03d}.txt").write_text(caption)
  return path


@pytest.fixture(scope="module")
def arguments(checkpoint, pictures):
  return [
    f"--source={pictures}",
    f"--checkpoint={checkpoint}",
    "--image_size=32",
    "--batch_size=4",
    "--records_per_shard=10",
    "--min_pictures=9",
  ]


@pytest.fixture(scope="module")
def command(arguments, tmp_path_factory):
  compiled = tmp_path_factory.mktemp("compiled")
  return [
    *(sys.executable, "-m", "sana_jax.precompute", *arguments),
    f"--compilation_cache_dir={compiled}",
  ]


def environment() -> dict[str, str]:
  return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}


def run(command, *more):
  return subprocess.run(
    [*command, *more],
    capture_output=True,
    text=True,
    check=False,
    env=environment(),
  )


def start(command, *more) -> subprocess.Popen:
  return subprocess.Popen(
    [*command, *more],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    env=environment(),
  )


def contents(path) -> dict[str, bytes]:
  return {
    file.name: file.read_bytes()
    for file in path.iterdir()
    if not file.name.startswith(".lock")
  }


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
  """The directory of a run that nobody disturbed, and its seconds."""
  path = tmp_path_factory.mktemp("whole")
  begin = time.monotonic()
  done = run(command, f"--output={path}", "--check=9")
  assert done.returncode == 3, done.stderr
  assert "skipped p007: The image is cut off" in done.stderr
  assert "skipped p040: This is no image that can be read" in done.stderr
  assert "118 records in 12 shards" in done.stderr
  return path, time.monotonic() - begin


def test_the_command_makes_a_cache_with_a_report(whole):
  source = cache.CachedSource(whole[0])
  assert len(source) == COUNT - 2
  report = json.loads((whole[0] / "report.json").read_text())
  assert report["skipped"].keys() == {"p007", "p040"}
  found = report["reconstruction"]["psnr_by_bucket"]
  assert sum(each["count"] for each in found.values()) == 9
  assert (whole[0] / "worst.png").stat().st_size > 1000
  # A random autoencoder knows no picture.
  assert "does not know such pictures" in report["warning"]


@pytest.mark.long
def test_some_pictures_are_compared_unless_that_was_done(
  command, whole, tmp_path
):
  shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
  before = contents(tmp_path)
  assert run(command, f"--output={tmp_path}").returncode == 3
  assert contents(tmp_path) == before
  (tmp_path / "report.json").unlink()
  done = run(command, f"--output={tmp_path}")
  assert done.returncode == 3
  assert "precompute: WARNING: the autoencoder of" in done.stderr
  report = json.loads((tmp_path / "report.json").read_text())
  found = report["reconstruction"]["psnr_by_bucket"]
  assert sum(each["count"] for each in found.values()) == 8


def test_a_run_that_is_killed_again_and_again_makes_the_same_bytes(
  command, whole, tmp_path
):
  expected, seconds = whole
  rng = random.Random(0)
  kills, amid = 0, 0
  for attempt in range(40):
    before = len(list(tmp_path.glob("shard*")))
    process = start(command, f"--output={tmp_path}", "--check=9")
    if attempt % 4 == 3:
      time.sleep(rng.uniform(0, seconds))
    else:
      # Most kills hit the work itself: a start takes most of the time.
      while process.poll() is None:
        if len(list(tmp_path.glob("shard*"))) > before:
          time.sleep(rng.uniform(0, 0.2))
          break
        time.sleep(0.002)
    if process.poll() is not None:
      break
    process.send_signal(signal.SIGKILL)
    process.wait()
    kills += 1
    amid += 0 < len(list(tmp_path.glob("shard*.json"))) < 12
  assert process.returncode == 3
  assert kills >= 3
  assert amid >= 2
  assert contents(tmp_path) == contents(expected)


@pytest.mark.long
def test_two_hosts_at_once_make_what_one_makes(command, whole, tmp_path):
  hosts = [
    start(command, f"--output={tmp_path}", "--num_hosts=2", f"--host_index={i}")
    for i in range(2)
  ]
  # Each of the broken pictures is another host's.
  assert [process.wait() for process in hosts] == [3, 0]
  ours, theirs = contents(tmp_path), contents(whole[0])
  measured = {"report.json", "worst.png"}
  assert ours.keys() - measured == theirs.keys() - measured
  for name in ours.keys() - measured:
    assert ours[name] == theirs[name], name


def test_sigterm_ends_a_run_after_the_shard_at_hand(command, whole, tmp_path):
  process = subprocess.Popen(
    [*command, f"--output={tmp_path}"],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    env=environment(),
  )
  while process.poll() is None and not list(tmp_path.glob("shard*.json")):
    time.sleep(0.002)
  process.terminate()
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  assert "the same command goes on from here" in errors
  assert 1 <= len(list(tmp_path.glob("shard*.json"))) < 12
  assert not list(tmp_path.glob(".tmp-*"))
  missing = run(
    [sys.executable, "-m", "sana_jax.precompute.finalise"],
    f"--output={tmp_path}",
  )
  assert missing.returncode == 1
  made = len(list(tmp_path.glob("shard*.json")))
  assert f"is not finished, {12 - made} of 12 shards" in missing.stderr
  assert run(command, f"--output={tmp_path}", "--check=9").returncode == 3
  assert contents(tmp_path) == contents(whole[0])


def test_a_full_disk_is_said_in_one_line_and_a_restart_continues(
  command, whole, tmp_path
):
  size = max(path.stat().st_size for path in whole[0].glob("shard*"))
  limit = f'ulimit -f {size // 2 // 1024}; exec "$@"'
  done = run(["bash", "-c", limit, "bash", *command], f"--output={tmp_path}")
  assert done.returncode == 1, done.stderr
  (line,) = (
    text for text in done.stderr.splitlines() if text.startswith("precompute")
  )
  assert "Cannot write" in line
  assert "run the same command again" in line
  assert "Traceback" not in done.stderr
  assert not list(tmp_path.glob("*shard*"))
  assert run(command, f"--output={tmp_path}", "--check=9").returncode == 3
  assert contents(tmp_path) == contents(whole[0])


def test_the_help_names_the_flags(command):
  done = run([*command[:3], "--help"])
  for name in ("source", "checkpoint", "output", "vae_tile", "check"):
    assert f"--{name}: " in done.stdout


def test_impossible_flags_are_said_in_one_line(command, tmp_path):
  output = f"--output={tmp_path}"
  for flag, message in (
    ("--host_index=0", "--num_hosts and --host_index go together"),
    ("--check=-1", "--check must not be negative, got -1"),
    ("--output=gs://x/y", "--output=gs://x/y is not on a disk"),
    ("--image_size=30", "image_size must be a multiple of 4"),
  ):
    done = run(command, output, flag)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_beam_makes_the_same_bytes(arguments, whole, tmp_path):
  pytest.importorskip("apache_beam")
  done = run(
    [sys.executable, "-m", "sana_jax.precompute.beam", *arguments],
    f"--output={tmp_path}",
    "--runner=DirectRunner",
  )
  assert done.returncode == 3, done.stderr
  ours, theirs = contents(tmp_path), contents(whole[0])
  measured = {"report.json", "worst.png"}
  assert ours.keys() == theirs.keys() - measured
  for name in ours:
    assert ours[name] == theirs[name], name
