"""train.py as a user runs it: killed, stopped, misspelled, on several hosts."""

import json
import multiprocessing
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from absl import app

from sana_jax import pipeline as pipeline_lib
from sana_jax import tree
from tests import tiny

ROOT = pathlib.Path(__file__).parents[1]
CACHE = pathlib.Path(tempfile.gettempdir()) / "sana_jax_test_cache"
PATIENCE = 900  # seconds; loaded machines are slow

AUTOENCODER = """
from sana_jax import config as config_lib


def get_config():
  config = config_lib.AutoencoderConfig()
  # The smallest that still has something of all kinds: it is compiled often.
  kinds, channels, layers = ("ResBlock",) * 3, (4, 8, 8), (0, 0, 1)
  config.model = config_lib.DCAEConfig(
    latent_channels=4,
    encoder_block_types=kinds,
    decoder_block_types=kinds,
    encoder_block_out_channels=channels,
    decoder_block_out_channels=channels,
    encoder_layers_per_block=layers,
    decoder_layers_per_block=layers,
    encoder_qkv_multiscales=((),) * 3,
    decoder_qkv_multiscales=((),) * 3,
  )
  config.data.split = "heldout"
  config.num_steps = 60
  config.batch_size = 8
  config.optim.warmup_steps = 2
  config.optim.schedule = "cosine"
  # Updates are smooth functions of the gradients: with the default of 1e-8,
  # Adam makes whole steps of what is rounding alone.
  config.optim.eps = 1e-3
  config.latent_noise = 0.1
  config.log_every = 1
  config.checkpoint.every = 10
  config.sample_every = 50
  config.mesh = {"data": 2, "fsdp": 4}
  config.dtype = "float32"
  config.remat = "none"
  return config
"""

TEXT_TO_IMAGE = """
from sana_jax import config as config_lib
from sana_jax import text
from tests import tiny


def get_config(directory):
  tokenizer = text.Tokenizer.from_pretrained(directory + "/tokenizer")
  config = config_lib.TextToImageConfig()
  config.autoencoder = directory + "/vae"
  config.tokenizer = directory + "/tokenizer"
  config.text_encoder_path = directory + "/text_encoder"
  config.text_encoder = tiny.text_encoder_config(tokenizer.vocab_size)
  config.model = tiny.transformer_config()
  config.max_sequence_length = tiny.LENGTH
  config.data.split = "heldout"
  config.data.keyword_probability = 0.5
  config.num_steps = 3
  config.batch_size = 8
  config.mesh = {"data": 2, "fsdp": 4}
  config.sample_prompts = ("a red apple", "a green cat")
  config.sample_steps = 2
  return config
"""


def start(config, workdir, *flags, **environment) -> subprocess.Popen:
  command = [
    *(sys.executable, str(ROOT / "train.py"), f"--config={config}"),
    *(f"--workdir={workdir}", f"--compilation_cache_dir={CACHE}", *flags),
  ]
  return subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def finish(process: subprocess.Popen) -> str:
  output, _ = process.communicate(timeout=PATIENCE)
  assert process.returncode == 0, output
  return output


def wait_for(path: pathlib.Path, process: subprocess.Popen) -> None:
  deadline = time.monotonic() + PATIENCE
  while not path.exists():
    assert process.poll() is None, process.communicate()[0]
    assert time.monotonic() < deadline, f"{path} does not appear"
    time.sleep(0.02)


def metrics(workdir: pathlib.Path) -> list[dict[str, float]]:
  """What a run measured, without what depends on the clock."""
  rows = (workdir / "metrics.jsonl").read_text().splitlines()
  clock = {
    *("time", "images_per_second", "images_per_second_per_device"),
    *("seconds_per_step", "seconds_left", "data_wait", "tflops_per_device"),
  }
  return [
    {name: v for name, v in json.loads(row).items() if name not in clock}
    for row in rows
  ]


def exported(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  (path,) = (workdir / "export" / "vae").glob("*.safetensors")
  return safetensors.numpy.load_file(path)


def final_state(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """All that the last checkpoint holds, by name."""
  path = workdir / "checkpoints" / "60" / "state"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    saved = reader.metadata(path).item_metadata.tree
    arguments = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), saved
    )
    state = reader.restore(
      path, args=ocp.args.PyTreeRestore(restore_args=arguments)
    )
  return dict(zip(tree.leaf_names(state), jax.tree.leaves(state), strict=True))


def newest_checkpoint(workdir: pathlib.Path) -> int:
  names = [path.name for path in (workdir / "checkpoints").iterdir()]
  return max(int(name) for name in names if name.isdigit())


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  path = tmp_path_factory.mktemp("configs") / "autoencoder.py"
  path.write_text(AUTOENCODER)
  return path


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
  """The workdir of a run that nothing disturbed."""
  workdir = tmp_path_factory.mktemp("whole")
  finish(start(config, workdir))
  return workdir


def assert_same_run(workdir, whole, tolerance: float = 0):
  """Compares the data seen (by their losses), and all of the last state.

  Args:
    tolerance: largest difference, in units of the largest value of an array.
  """
  expected, found = metrics(whole), metrics(workdir)
  assert [row["step"] for row in found] == list(range(1, 61))
  # Every step has a batch of its own, and so a loss.
  assert len({row["loss"] for row in expected}) == 60
  for a, b in zip(found, expected, strict=True):
    assert_close(a, b, tolerance)
  theirs = final_state(whole)
  parts = {name.split("/")[0] for name in theirs}
  assert parts == {"step", "params", "ema", "opt_state", "skipped"}
  assert_close(final_state(workdir), theirs, tolerance)
  assert_close(exported(workdir), exported(whole), tolerance)


def assert_close(ours: dict, theirs: dict, tolerance: float) -> None:
  assert ours.keys() == theirs.keys()
  for name, value in theirs.items():
    largest = tolerance * float(np.abs(value).max())
    np.testing.assert_allclose(
      ours[name], value, rtol=0, atol=largest, err_msg=name
    )


@pytest.mark.slow
def test_a_killed_run_continues_as_if_nothing_had_happened(
  config, whole, tmp_path
):
  first = start(config, tmp_path)
  step = 10 * random.randint(1, 4)
  wait_for(tmp_path / "checkpoints" / str(step), first)
  first.kill()
  first.communicate()
  assert first.returncode == -signal.SIGKILL
  assert step <= newest_checkpoint(tmp_path) < 60
  output = finish(start(config, tmp_path))
  assert "resuming from step" in output
  assert_same_run(tmp_path, whole)


@pytest.mark.slow
def test_sigterm_saves_the_step_and_leaves_with_success(
  config, whole, tmp_path
):
  # Nothing but the signal makes this run save.
  rare = "--config.checkpoint.every=1000"
  first = start(config, tmp_path, rare)
  wait_for(tmp_path / "metrics.jsonl", first)
  time.sleep(random.uniform(0, 0.5))
  first.terminate()
  output = finish(first)
  step = newest_checkpoint(tmp_path)
  assert 0 < step < 60
  assert f"asked to stop: saved step {step}" in output
  assert not (tmp_path / "export").exists()
  output = finish(start(config, tmp_path, rare))
  assert f"resuming from step {step}" in output
  assert_same_run(tmp_path, whole)


def start_two(config, workdir, *flags) -> list[subprocess.Popen]:
  """Starts two processes of four devices that make one run."""
  with socket.socket() as free:
    free.bind(("", 0))
    coordinator = f"--coordinator=localhost:{free.getsockname()[1]}"
  return [
    start(
      *(config, workdir, coordinator, "--num_processes=2"),
      *(f"--process_id={rank}", "--heartbeat_timeout=20", *flags),
      # With the cache: only process 0 writes it, and finds its programs there,
      # while the other compiles.
      XLA_FLAGS="--xla_force_host_platform_device_count=4",
    )
    for rank in range(2)
  ]


def kill_one_of(pair, victim: int) -> None:
  """Kills a process amid a step; the other must end soon, and say why."""
  time.sleep(random.uniform(0, 0.3))
  pair[victim].kill()
  died = time.monotonic()
  output, _ = pair[1 - victim].communicate(timeout=PATIENCE)
  pair[victim].communicate()
  assert time.monotonic() - died < 60
  assert pair[1 - victim].returncode not in (0, None), output
  # Where no collective fails first, JAX ends the process when it misses the
  # other's heartbeat, or the coordinator.
  ours = f"process {1 - victim} of 2 ends after" in output
  assert ours or "another task died" in output, output
  assert not ours or "Run the same command again on all hosts" in output
  assert "if one of the processes dies, all end within about 20 s" in output


@pytest.mark.slow
def test_processes_and_meshes_may_change_and_die(config, whole, tmp_path):
  """Two are asked to stop; of two, each dies once; one alone ends the run."""
  flags = ("--config.mesh.data=4", "--config.mesh.fsdp=2")
  rare = "--config.checkpoint.every=1000"
  pair = start_two(config, tmp_path, *flags, rare)
  wait_for(tmp_path / "metrics.jsonl", pair[0])
  time.sleep(random.uniform(0, 0.5))
  pair[1].terminate()
  for rank, process in enumerate(pair):
    output = finish(process)
    assert "asked to stop: saved step" in output
    assert "waiting for 2 processes at localhost:" in output
    assert f"process {rank} of 2: 4 local of 8 devices" in output
  stopped = newest_checkpoint(tmp_path)
  assert 0 < stopped < 40
  for victim in (0, 1):
    pair = start_two(config, tmp_path, *flags)
    step = newest_checkpoint(tmp_path) // 10 * 10 + 10
    wait_for(tmp_path / "checkpoints" / str(step), pair[0])
    kill_one_of(pair, victim)
  last = finish(start(config, tmp_path))
  assert "resuming from step" in last
  # Sums over devices are taken in another order: 2e-7 was measured.
  assert_same_run(tmp_path, whole, 1e-6)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run(config, tmp_path):
  process = start(config, tmp_path)
  wait_for(tmp_path / "checkpoints" / "10", process)
  (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
  (tmp_path / "checkpoints").write_text("")
  output, _ = process.communicate(timeout=PATIENCE)
  assert process.returncode == 1
  assert "Make room or mend the permissions" in output
  line = [x for x in output.splitlines() if "could not be written" in x][-1]
  assert f"to {tmp_path}/checkpoints (" in line


@pytest.mark.slow
@pytest.mark.long
def test_text_to_image_trains_and_its_export_makes_images(tmp_path):
  tiny.make_tokenizer(tmp_path / "made")
  pipe = tiny.make_pipeline(
    tmp_path / "made", autoencoder=tiny.autoencoder_config(4)
  )
  pipe.save_pretrained(tmp_path / "base")
  config = tmp_path / "text_to_image.py"
  config.write_text(TEXT_TO_IMAGE)
  workdir = tmp_path / "run"
  finish(start(f"{config}:{tmp_path / 'base'}", workdir))
  assert [row["step"] for row in metrics(workdir)] == [3]
  assert (workdir / "samples" / "step_0000003.png").exists()
  trained = pipeline_lib.SanaPipeline.from_pretrained(
    workdir / "export", devices=jax.devices()[:1]
  )
  assert trained.generation_config.num_inference_steps == 2
  images = trained("a red apple").images
  assert images.shape == (1, 64, 64, 3)
  assert images.std() > 0
  unfinished = pipeline_lib.SanaPipeline.from_pretrained(workdir, step=3)
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.tree.leaves(unfinished.transformer),
    jax.tree.leaves(trained.transformer),
  )
  assert unfinished.generation_config == trained.generation_config
  assert unfinished.solver == trained.solver
  again = trained.transformer.head.projection.kernel
  assert not np.array_equal(again, pipe.transformer.head.projection.kernel)


MISTAKES = {
  "misspelled field": (
    "{config}",
    ["--config.batchsize=8"],
    "has no field 'batchsize'. Did you mean 'batch_size'",
  ),
  "misspelled nested field": (
    "{config}",
    ["--config.optim.lr=1"],
    "has no field 'optim.lr'. Did you mean 'optim.peak_lr'",
  ),
  "value of another type": (
    "{config}",
    ["--config.batch_size=eight"],
    "flag --config.batch_size=eight: invalid literal",
  ),
  "value that cannot be": (
    "{config}",
    ["--config.num_steps=0"],
    "num_steps must be positive, got 0",
  ),
  "unknown flag": ("{config}", ["--nonsense"], "Unknown command line flag"),
  "argument": ("{config}", ["more"], "Unexpected arguments: ['more']"),
  "mesh": (
    "{config}",
    ["--config.mesh.data=3"],
    "mesh {'data': 3, 'fsdp': 4} does not fit 8 devices",
  ),
  "no such config": ("{dir}/none.py", [], "there is no file"),
  "no get_config": ("{dir}/empty.py", [], "no attribute 'get_config'"),
  "misspelled in the file": (
    "{dir}/misspelled.py",
    [],
    "AutoencoderConfig has no field 'batchsize'",
  ),
  "other config": (
    "{dir}/other.py",
    [],
    "must return one of TextToImageConfig, AutoencoderConfig, StagesConfig, "
    "got SanaConfig",
  ),
  "no such data": (
    "{config}",
    ["--config.data.data_dir=/nowhere"],
    "no emoji data set in '/nowhere'",
  ),
}


def run_command(arguments: list[str], path: pathlib.Path) -> None:
  """Does what `python train.py` does, and writes what it prints to a file."""
  with path.open("wb") as output:
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
  sys.argv = ["train.py", *arguments]
  # Here, because it defines flags, as other commands do.
  import train  # noqa: PLC0415

  app.run(train.main, flags_parser=train._parse_flags)


@pytest.mark.slow
def test_mistakes_end_in_one_line(config, tmp_path):
  head = "from sana_jax import config as config_lib\n\ndef get_config():\n"
  (tmp_path / "empty.py").write_text("")
  (tmp_path / "other.py").write_text(head + "  return config_lib.SanaConfig()")
  (tmp_path / "misspelled.py").write_text(
    head + "  config = config_lib.AutoencoderConfig()\n  config.batchsize = 1\n"
  )
  commands = {
    name: [
      f"--config={path.format(config=config, dir=tmp_path)}",
      *(f"--workdir={tmp_path / 'run'}", *flags),
    ]
    for name, (path, flags, _) in MISTAKES.items()
  }
  expected = {name: message for name, (*_, message) in MISTAKES.items()}
  commands["no workdir"] = [f"--config={config}"]
  expected["no workdir"] = "--workdir must have a value"
  # Forks of a process that has imported everything: that takes seconds.
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["train"])
  for name, flags in commands.items():
    path = tmp_path / name
    process = context.Process(target=run_command, args=(flags, path))
    process.start()
    process.join(PATIENCE)
    output = path.read_text()
    assert process.exitcode not in (0, None), (name, output)
    assert "Traceback" not in output, (name, output)
    lines = [x for x in output.splitlines() if expected[name] in x]
    assert len(lines) == 1, (name, output)
    assert len(lines[0]) < 500, (name, output)


@pytest.mark.slow
def test_a_wrong_autoencoder_is_named_before_anything_is_made(tmp_path):
  flags = ["--config.autoencoder=/nowhere"]
  process = start("configs/emoji.py", tmp_path / "run", *flags)
  output, _ = process.communicate(timeout=PATIENCE)
  assert process.returncode == 1
  assert "Traceback" not in output
  assert "/nowhere does not exist; expected a directory" in output
  assert not (tmp_path / "run").exists()


def test_a_misspelled_flag_is_one_line(config, tmp_path):
  process = start(config, tmp_path / "run", "--config.batchsize=8")
  output, _ = process.communicate(timeout=PATIENCE)
  assert process.returncode == 1
  said = "train.py: --config: AutoencoderConfig has no field 'batchsize'. Did"
  assert output.startswith(said)
  assert output.count("\n") == 1
