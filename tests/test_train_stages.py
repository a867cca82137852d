"""train.py on stages: killed in the second, it goes on there."""

import json

import pytest

from tests import test_train

CONFIG = """
from sana_jax import config as config_lib
from tests import tiny


def stage(grid):
  config = config_lib.TextToImageConfig()
  config.model = tiny.transformer_config(sample_size=grid, num_layers=1)
  config.text_encoder = tiny.text_encoder_config(300)
  config.max_sequence_length = tiny.LENGTH
  config.data.synthetic = True
  config.data.image_size = 8 * grid
  config.batch_size = 8
  config.num_steps = 30
  config.checkpoint.every = 2
  config.log_every = 1
  config.optim.warmup_steps = 0
  return config


def get_config():
  stages = {"px32": stage(4), "px64": stage(8)}
  return config_lib.StagesConfig(stages=stages)
"""
SHORT = "--config.stages.px32.num_steps=2"


@pytest.mark.long
def test_stages_that_were_killed_go_on_in_the_one_that_ran(tmp_path):
  config = tmp_path / "stages.py"
  config.write_text(CONFIG)
  workdir = tmp_path / "run"
  first = test_train.start(config, workdir, SHORT)
  test_train.wait_for(workdir / "px64" / "checkpoints" / "2", first)
  first.kill()
  first.communicate()
  step = test_train.newest_checkpoint(workdir / "px64")
  assert step < 30
  output = test_train.finish(test_train.start(config, workdir, SHORT))
  assert "stage px32 (1 of 2) is finished" in output
  assert f"resuming from step {step}" in output
  rows = test_train.metrics(workdir / "px64")
  assert [row["step"] for row in rows] == list(range(1, 31))
  finished = json.loads((workdir / "px64" / "finished.json").read_text())
  assert finished == {"step": 30}
  described = json.loads((workdir / "px64" / "config.json").read_text())
  assert described["init_from"] == str(workdir / "px32")
  wrong = "--config.stages.px128.num_steps=2"
  process = test_train.start(config, workdir, wrong)
  output, _ = process.communicate(timeout=test_train.PATIENCE)
  assert process.returncode == 1
  assert "px128" in output.splitlines()[-1]
