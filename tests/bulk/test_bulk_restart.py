"""Runs of sample.py that are killed, divided, and filled disks."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

from tests import tiny

pytestmark = pytest.mark.slow

NUM_PROMPTS = 70
SIZES = (32, 24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  tokenizer = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(tokenizer)
  path = tmp_path_factory.mktemp("checkpoint")
  tiny.make_pipeline(tokenizer).save_pretrained(path)
  return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
  """200 images: two sizes, own seeds, several images a prompt, a bad line."""
  rng = np.random.default_rng(0)
  lines = []
  for i in range(NUM_PROMPTS):
    record = {"prompt": f"{tiny.CAPTIONS[i % 3]} {i}"}
    record["height"] = int(rng.choice(SIZES))
    record["num_images_per_prompt"] = 2 if i < 10 else 3
    if rng.random() < 0.3:
      record["seed"] = int(rng.integers(1000))
    lines.append(json.dumps(record))
  lines.insert(5, '{"prompt": ')
  path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
  path.write_text("\n".join(lines))
  return path


@pytest.fixture(scope="module")
def command(checkpoint, prompts, tmp_path_factory):
  cache = tmp_path_factory.mktemp("cache")
  return [
    sys.executable,
    "sample.py",
    f"--checkpoint={checkpoint}",
    f"--prompt_file={prompts}",
    f"--compilation_cache_dir={cache}",
    "--num_inference_steps=40",
    "--batch_size=4",
    "--seed=3",
  ]


def run(command, *more, devices=1, **options):
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  return subprocess.run(
    [*command, *more],
    capture_output=True,
    text=True,
    check=False,
    env=environment,
    **options,
  )


def start(command, *more) -> subprocess.Popen:
  environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
  return subprocess.Popen(
    [*command, *more],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
    env=environment,
  )


def format_flags(output_format) -> list[str]:
  flags = [f"--output_format={output_format}"]
  return flags if output_format == "png" else [*flags, "--images_per_shard=20"]


def contents(directory) -> dict[str, bytes]:
  found = {path.name: path.read_bytes() for path in directory.iterdir()}
  # What was free when the run began is another number each time.
  run_json = json.loads(found["run.json"])
  assert run_json.pop("available_bytes") > 0
  return found | {"run.json": json.dumps(run_json).encode()}


def pixels(directory) -> dict[str, np.ndarray]:
  found = {}
  for path in directory.glob("*.png"):
    with PIL.Image.open(path) as image:
      found[path.name] = np.asarray(image, np.int64)
  return found


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
  """The directory of a run that nobody disturbed, for each format."""
  made = {}

  def get(output_format):
    if output_format not in made:
      path = tmp_path_factory.mktemp(output_format)
      begin = time.monotonic()
      done = run(command, f"--output_dir={path}", *format_flags(output_format))
      assert done.returncode == 3, done.stderr
      assert "prompts.jsonl:6: broken JSON" in done.stderr
      made[output_format] = (path, time.monotonic() - begin)
    return made[output_format]

  return get


def wait_for_growth(process, manifest, size: int) -> None:
  while process.poll() is None:
    if manifest.exists() and manifest.stat().st_size > size:
      return
    time.sleep(0.002)


@pytest.mark.parametrize(
  "output_format",
  [
    "png",
    pytest.param("webdataset", marks=pytest.mark.long),
    pytest.param("arrayrecord", marks=pytest.mark.long),
  ],
)
def test_a_run_that_is_killed_again_and_again_makes_the_same_files(
  command, whole, tmp_path, output_format
):
  expected, seconds = whole(output_format)
  rng = random.Random(0)
  manifest = tmp_path / "manifest.jsonl"
  kills = 0
  for attempt in range(100):
    size = manifest.stat().st_size if manifest.exists() else 0
    process = start(
      command, f"--output_dir={tmp_path}", *format_flags(output_format)
    )
    # Most kills hit the work itself: a start takes most of the time.
    if attempt % 4 == 3:
      time.sleep(rng.uniform(0, seconds))
    else:
      wait_for_growth(process, manifest, size)
      time.sleep(rng.uniform(0, 0.4))
    if process.poll() is not None:
      break
    process.send_signal(signal.SIGKILL)
    process.wait()
    kills += 1
  assert process.returncode == 3
  assert kills >= 3
  assert contents(tmp_path) == contents(expected)
  lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
  indices = sorted(json.loads(line)["index"] for line in lines)
  # The sixth line is bad: five of two images are before it.
  assert indices == [i for i in range(201) if i != 10]


@pytest.mark.long
def test_two_hosts_make_what_one_makes(command, whole, tmp_path):
  expected, _ = whole("png")
  processes = [
    start(
      command, f"--output_dir={tmp_path}", "--num_hosts=2", f"--host_index={i}"
    )
    for i in range(2)
  ]
  assert [process.wait() for process in processes] == [3, 3]
  manifests = sorted(path.name for path in tmp_path.glob("*.jsonl"))
  assert manifests == [f"manifest-0000{i}-of-00002.jsonl" for i in range(2)]
  ours, theirs = pixels(tmp_path), pixels(expected)
  assert len(ours) == 200
  assert ours.keys() == theirs.keys()
  for name, image in ours.items():
    np.testing.assert_array_equal(image, theirs[name])


@pytest.mark.long
def test_processes_of_a_slurm_job_share_the_work(command, whole, tmp_path):
  expected, _ = whole("png")
  # What a job of two tasks on one node has in its environment.
  slurm = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
  }
  processes = [
    subprocess.Popen(
      [*command, f"--output_dir={tmp_path}", "--distributed"],
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      env=os.environ
      | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
      | slurm
      | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
    )
    for rank in range(2)
  ]
  for process in processes:
    _, errors = process.communicate()
    assert process.returncode == 3, errors
  manifests = sorted(path.name for path in tmp_path.glob("*.jsonl"))
  assert manifests == [f"manifest-0000{i}-of-00002.jsonl" for i in range(2)]
  ours, theirs = pixels(tmp_path), pixels(expected)
  assert ours.keys() == theirs.keys()
  for name, image in ours.items():
    np.testing.assert_array_equal(image, theirs[name])


@pytest.mark.long
@pytest.mark.parametrize(("batch_size", "devices"), [(7, 1), (16, 8)])
def test_an_image_depends_on_neither_batch_nor_devices(
  command, whole, tmp_path, batch_size, devices
):
  expected, _ = whole("png")
  done = run(
    command,
    f"--output_dir={tmp_path}",
    f"--batch_size={batch_size}",
    devices=devices,
  )
  assert done.returncode == 3, done.stderr
  ours, theirs = pixels(tmp_path), pixels(expected)
  assert ours.keys() == theirs.keys()
  differences = [np.abs(ours[name] - theirs[name]) for name in ours]
  # Sums are added up in another order, and rounding to 8 bits may go over.
  assert max(d.max() for d in differences) <= 1
  share = sum((d > 0).sum() for d in differences) / sum(
    d.size for d in differences
  )
  assert share < 1e-3, share


def test_sigterm_ends_a_run_after_the_unit_at_hand(command, whole, tmp_path):
  expected, _ = whole("webdataset")
  more = [f"--output_dir={tmp_path}", *format_flags("webdataset")]
  process = subprocess.Popen(
    [*command, *more],
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
  )
  wait_for_growth(process, tmp_path / "manifest.jsonl", 0)
  process.terminate()
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  assert "the same command goes on from here" in errors
  shards = list(tmp_path.glob("*.tar"))
  assert 1 <= len(shards) < 10
  assert not list(tmp_path.glob(".tmp-*"))
  assert run(command, *more).returncode == 3
  assert contents(tmp_path) == contents(expected)


def test_a_full_disk_is_said_in_one_line_and_a_restart_continues(
  command, whole, tmp_path
):
  expected, _ = whole("webdataset")
  size = max(path.stat().st_size for path in expected.glob("*.tar"))
  more = [f"--output_dir={tmp_path}", *format_flags("webdataset")]
  limited = ["bash", "-c", f'ulimit -f {size // 2 // 1024}; exec "$@"', "bash"]
  done = run([*limited, *command], *more)
  assert done.returncode == 1, done.stderr
  (line,) = (
    line for line in done.stderr.splitlines() if line.startswith("sample.py")
  )
  assert "File too large" in line
  assert str(tmp_path) in line
  assert "run the same command again" in line
  assert "Traceback" not in done.stderr
  assert {p.name for p in tmp_path.iterdir()} <= {"run.json", "manifest.jsonl"}
  assert run(command, *more).returncode == 3
  assert contents(tmp_path) == contents(expected)
