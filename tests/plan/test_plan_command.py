"""The command, from its flags to what it writes."""

import json
import subprocess
import sys
import textwrap

import pytest

from sana_jax.plan import roofline, sampling

CONFIG = """\
from sana_jax import config as config_lib


def get_config():
  config = config_lib.TextToImageConfig(model=config_lib.sana_600m())
  config.data.synthetic = True
  return config
"""


def run(tmp_path, *arguments):
  path = tmp_path / "run.py"
  path.write_text(textwrap.dedent(CONFIG))
  return subprocess.run(
    [sys.executable, "-m", "sana_jax.plan", f"--config={path}", *arguments],
    capture_output=True,
    text=True,
    check=False,
  )


def test_what_is_wrong_is_said_in_one_line(tmp_path):
  done = run(tmp_path, "--topology=v9:2x2")
  assert done.returncode == 1
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("plan: topology 'v9:2x2' is not one of")


def test_flags_of_sampling_are_refused_in_training(tmp_path):
  done = run(tmp_path, "--topology=v5e:2x2", "--steps=4")
  assert done.returncode == 1
  (line,) = done.stderr.strip().splitlines()
  assert line.startswith("plan: --steps: only with --what=sample")


def test_a_field_that_is_not_there_is_one_line(tmp_path):
  done = run(tmp_path, "--topology=v5e:2x2", "--config.nosuch=1")
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1].startswith("plan: --config: ")
  assert "nosuch" in done.stderr
  assert "Traceback" not in done.stderr


def test_fields_of_the_config_are_set_and_checked(tmp_path):
  changed = "--config.train_text_encoder=True"
  done = run(tmp_path, "--topology=v5e:2x2", changed)
  assert done.returncode == 1
  assert "train_text_encoder must be False" in done.stderr


# The command as far as the plan, of which it prints settings.
COMMAND = """\
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax
from absl import app

from sana_jax.plan import __main__ as command

def describe(name, num_slices):
  return command.topology.Topology(name, "v5e", tuple(jax.devices()), 1)

def plan(config, devices, **_):
  print(config.hardware.preset, config.remat, config.optim.accumulation)
  raise ValueError("no more")

command.topology.describe = describe
command.training.plan = plan
app.run(command.main, flags_parser=command._parse_flags)
"""


def test_flags_are_kept_beside_the_preset_of_the_chips():
  done = subprocess.run(
    [
      *(sys.executable, "-c", COMMAND),
      *("--config=configs/sana_1600m_1024.py", "--topology=v5e:2x4"),
      *("--config.remat=offload", "--config.optim.accumulation=64"),
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.split() == ["v5e-8", "offload", "64"], done.stderr


@pytest.mark.tpu_aot
def test_a_small_step_for_tpus_gathers_kernels_and_scatters_gradients(
  tmp_path,
):
  """Whatever the size: kernels twice, gradients once, and no activation."""
  pytest.importorskip("libtpu")
  path = tmp_path / "plan.json"
  done = run(
    *(tmp_path, "--topology=v5e:2x2", f"--json={path}"),
    *("--config.model.num_layers=20", "--config.model.sample_size=8"),
    *("--config.batch_size=16", "--config.mesh.data=1"),
    *("--config.mesh.fsdp=4", "--config.remat=full"),
  )
  assert done.returncode == 0, done.stderr
  assert "v5e:2x2 (4 chips)" in done.stdout
  record = json.loads(path.read_text())
  assert record["gathered_activations"] == []
  assert record["ratio"] <= 1.10
  sent, least = record["sent_bytes"], record["least_bytes"]
  # All layers, which a scan compiles as one: beside two, what is gathered and
  # scattered outside of them would weigh too much.
  for kind in ("all-gather", "reduce-scatter"):
    assert sent[f"fsdp:{kind}"] == pytest.approx(least[f"fsdp:{kind}"], rel=0.1)
  assert record["fits"]


def test_the_page_of_sampling_says_what_each_stage_takes():
  stage = {
    "stage": "decoder",
    "program": "whole",
    "weights": 2**30,
    "working": 3 * 2**29,
    "total": 5 * 2**29,
    "fits": False,
  }
  prediction = roofline.Prediction(10.0, 2.5, 20.0)
  plan = sampling.Plan(
    *("sampling of 1 x 64x64", "decoded whole", [stage], 2**31, 4 * 10**12),
    *(0.5, 0.8, 1e5, prediction, {"jax": "1"}),
  )
  page = sampling.text(plan)
  assert (
    "decoder, whole                       1.00         1.50     2.50" in page
  )
  assert "DOES NOT FIT" in page
  assert "10.0 images/s; 100000 images in 2.5 h, 20 chip-hours" in page
  assert sampling.record(plan)["stages"] == [stage]
