"""Without the devices that JAX is told to use, one sentence says what to do."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

from sana_jax import devices

ROOT = pathlib.Path(__file__).parents[1]
JAX = {"jax": "0.10.2"}
LIBTPU = "Failed to open libtpu.so (set JAX_PLATFORMS='' to choose)"
BUSY = "The TPU is already in use by process with pid 7."


@pytest.mark.parametrize(
  ("asked", "reason", "installed", "said"),
  [
    (
      *("tpu", LIBTPU, JAX),
      "JAX cannot use JAX_PLATFORMS=tpu (Failed to open libtpu.so). Installed: "
      "jax 0.10.2. JAX's plugin for it is missing: pip install 'sana_jax[tpu]'."
      " JAX_PLATFORMS=cpu computes on the CPU.",
    ),
    (
      *("cuda,cpu", "", JAX | {"libtpu": "1"}),
      "JAX cannot use JAX_PLATFORMS=cuda,cpu. Installed: jax 0.10.2, libtpu 1. "
      "JAX's plugin for it is missing: pip install 'sana_jax[cuda]'.",
    ),
    (
      *("cuda", "", JAX | {"jax-cuda12-plugin": "2"}),
      "Installed: jax 0.10.2, jax-cuda12-plugin 2. `nvidia-smi` lists the GPUs",
    ),
    # Nothing was asked for, and a plugin fails.
    (
      *("", BUSY, JAX | {"libtpu": "1"}),
      "JAX cannot use the devices of this machine (The TPU is already in use "
      "by process with pid 7). Installed: jax 0.10.2, libtpu 1. `ls /dev/accel",
    ),
    ("gpu", "no rocm", JAX, "(no rocm). Installed: jax 0.10.2. There are cuda"),
  ],
)
def test_what_was_asked_what_is_there_and_what_to_do(
  asked, reason, installed, said
):
  assert said in devices.explain(asked, reason, installed)


def run(*command: str) -> subprocess.CompletedProcess:
  """Runs Python, told to use devices that no machine has."""
  return subprocess.run(
    [sys.executable, *command],
    env=os.environ | {"JAX_PLATFORMS": "quantum"},
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


def test_devices_that_are_missing_are_an_error():
  done = run("-c", "from sana_jax import devices; devices.check()")
  assert done.returncode == 1
  *_, last = done.stderr.splitlines()
  assert last.startswith("OSError: JAX cannot use JAX_PLATFORMS=quantum (")
  assert "Installed: jax " in last


@pytest.mark.slow
@pytest.mark.parametrize(
  "command",
  [
    ("sample.py", "--prompt=a cat", "--output_dir={}"),
    ("train.py", "--config=configs/emoji.py", "--workdir={}"),
    pytest.param(
      ("-m", "sana_jax.app", "--port=0"),
      marks=pytest.mark.skipif(
        importlib.util.find_spec("gradio") is None, reason="needs .[ui]"
      ),
    ),
    (
      *("-m", "sana_jax.precompute", "--source={}", "--output={}/cache"),
      "--checkpoint={}",
    ),
    ("-m", "sana_jax.tools.parity", "{}", "--transformer={}"),
  ],
  ids=" ".join,
)
def test_commands_end_in_one_line_without_their_devices(command, tmp_path):
  done = run(*(part.replace("{}", str(tmp_path)) for part in command))
  assert done.returncode in (1, 2)
  assert "Traceback" not in done.stderr
  assert "JAX cannot use JAX_PLATFORMS=quantum (" in done.stderr
  assert not list(tmp_path.iterdir())
