"""Each tool as a user runs it: its own process, real files."""

import json
import pathlib
import subprocess
import sys

import pytest

import sana_jax
from sana_jax.tools import parity
from sana_jax.weights import components, files

ROOT = pathlib.Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, "-m", f"sana_jax.tools.{module}", *map(str, arguments)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.parametrize(
  ("module", "words"),
  [
    ("inspect", "work directory of train.py"),
    ("convert", "--to {diffusers,original,orbax}"),
    ("parity", "in.encoder_hidden_states"),
  ],
)
def test_help_explains(module, words):
  result = run(module, "--help")
  assert result.returncode == 0
  assert words in result.stdout


def test_the_bundled_transformer_is_converted_inspected_and_compared(
  tmp_path, rng
):
  source = sana_jax.bundled_checkpoint() / "transformer"
  target = tmp_path / "orbax"
  result = run("convert", source, target, "--to=orbax")
  assert (result.returncode, result.stdout) == (0, f"{target}\n")
  result = run("inspect", target, "--json")
  assert result.returncode == 0
  assert json.loads(result.stdout)["parameters"] == 4_793_888
  model, config = components.load_transformer(source)
  inputs = {
    "hidden_states": rng.normal(size=(1, config.in_channels, 4, 4)),
    "timestep": rng.uniform(0, 1000, size=1),
    "encoder_hidden_states": rng.normal(size=(1, 3, config.caption_channels)),
  }
  inputs = {name: value.astype("float32") for name, value in inputs.items()}
  recorded = tmp_path / "recorded.safetensors"
  parity.record(recorded, inputs, parity.run(model, inputs))
  result = run("parity", recorded, f"--transformer={target}")
  assert result.returncode == 0, result.stderr
  assert result.stdout.endswith("no layer diverges by more than 0.0001\n")
  # Names that the architecture does not have.
  values = files.read_json(target / "config.json")
  files.write_json(target / "config.json", values | {"qk_norm": None})
  result = run("inspect", target)
  assert result.returncode == 1
  assert "unexpected tensor blocks/self_attention/norm_q/scale" in result.stdout
