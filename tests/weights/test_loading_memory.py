"""Loading needs little more memory than the parameters themselves."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import config as config_lib
from sana_jax.weights import components, files
from tests import synthetic


def small() -> config_lib.SanaConfig:
  """190M parameters: 760 MB in float32, 380 MB in bfloat16."""
  config = config_lib.sana_600m()
  config.num_layers = 8
  return config


def test_synthetic_checkpoints_have_the_published_files(tmp_path):
  config = config_lib.SanaConfig(
    num_attention_heads=2,
    num_layers=2,
    num_cross_attention_heads=1,
    cross_attention_head_dim=64,
    cross_attention_dim=64,
  )
  synthetic.write_transformer(tmp_path, config, max_shard_bytes=10**6)
  assert len(files.weight_files(tmp_path)) > 1
  model, found = components.load_transformer(tmp_path)
  assert found == config
  # Blocks differ, or a mixed-up order would go unnoticed.
  kernels = np.asarray(model.blocks.ffn.point.kernel[...])
  assert np.abs(kernels[0] - kernels[1]).max() > 0.01


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 8])
def test_peak_memory_is_little_more_than_the_parameters(tmp_path, devices):
  synthetic.write_transformer(tmp_path, small(), max_shard_bytes=5 * 10**8)
  command = ["-m", "tests.synthetic", "load", str(tmp_path)]
  options = ["--dtype=bfloat16", f"--devices={devices}"]
  output = subprocess.run(
    [sys.executable, *command, *options],
    check=True,
    capture_output=True,
    text=True,
  )
  found = json.loads(output.stdout.splitlines()[-1])
  assert found["held_mb"] > 350
  assert found["largest_device_mb"] < 1.1 * found["held_mb"] / devices
  assert found["peak_mb"] < 1.3 * found["held_mb"]


@pytest.mark.slow
def test_saving_needs_memory_for_a_few_tensors_and_returns_the_file(tmp_path):
  synthetic.write_transformer(tmp_path / "a", small(), dtype=jnp.bfloat16)
  model, config = components.load_transformer(
    tmp_path / "a", dtype=jnp.bfloat16
  )
  before = synthetic.peak_memory_reset()
  components.save_transformer(tmp_path / "b", model, config)
  # A tensor has 13 MB; the compiler of the slices takes most of it. A copy of
  # everything would be 370.
  assert synthetic.peak_memory() - before < 220
  first, second = (files.open_component(tmp_path / name) for name in ("a", "b"))
  assert first.keys() == second.keys()
  for name in first:
    np.testing.assert_array_equal(first[name], second[name])
