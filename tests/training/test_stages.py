"""Stages follow one another, each from what the one before has learned."""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from configs import stages_sana_1600m
from sana_jax import checkpoint, sharding
from sana_jax import config as config_lib
from sana_jax.training import loop, program, stages, text_to_image
from sana_jax.training import step as step_lib
from tests import tiny
from tests.training import test_loop, test_preemption

FIELDS = len(step_lib.TrainState._fields)


def make_stage(grid: int, **changes) -> config_lib.TextToImageConfig:
  values = {
    "model": tiny.transformer_config(sample_size=grid, num_layers=1),
    "text_encoder": tiny.text_encoder_config(300),
    "max_sequence_length": tiny.LENGTH,
    "data": config_lib.DataConfig(synthetic=True, image_size=4 * grid),
    "batch_size": 8,
    "num_steps": 2,
    "dtype": "float32",
    "remat": "none",
    "ema_decay": 0.5,
  }
  stage = config_lib.TextToImageConfig(**values | changes)
  stage.optim.warmup_steps = 0
  return stage


def make_config(**last) -> config_lib.StagesConfig:
  return config_lib.StagesConfig(
    stages={
      "small": make_stage(4),
      "large": make_stage(8, num_steps=4, **last),
    }
  )


def train_one(config, workdir, stop):
  recipe = text_to_image.make_recipe(config)
  return loop.train(config, workdir, recipe, stop=stop)


def stop_at(step: int, train_one=train_one):
  """Trains as `train_one` does, but is stopped in the second stage."""

  def train(config, workdir, stop):
    if workdir.name == "large":
      config = dataclasses.replace(config, num_steps=step)
    return train_one(config, workdir, stop)

  return train


def average(workdir, config):
  abstract = program.make_program(
    config,
    init=lambda key: text_to_image.init_params(config, key),
    param_axes=text_to_image.make_recipe(config).param_axes,
    loss_fn=lambda *_: None,
    mesh=sharding.make_mesh({"data": -1, "fsdp": 1}),
  ).state.ema
  return checkpoint.restore_part(workdir, "ema", abstract)


def assert_equal(found, expected):
  for a, b in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def toy_config(stage):
  """The toy run of the loop's tests stands for a stage."""
  return test_loop.make_config(num_steps=stage.num_steps, log_every=1)


def train_toy(config, workdir, stop):
  recipe = test_loop.make_recipe()
  return loop.train(toy_config(config), workdir, recipe, stop=stop)


def ending(calls, **steps):
  """A way to train that notes what it is given, and ends at these steps."""

  def train(config, workdir, stop):
    calls.append((workdir.name, config.init_from))
    workdir.mkdir(parents=True, exist_ok=True)
    step = steps.get(workdir.name, config.num_steps)
    return step_lib.TrainState(np.int32(step), *[None] * (FIELDS - 1))

  return train


def test_stages_follow_and_finished_ones_are_passed_over(tmp_path):
  calls = []
  small = str(tmp_path / "small")
  stages.train(make_config(), tmp_path, ending(calls, large=3))
  assert calls == [("small", None), ("large", small)]
  assert not (tmp_path / "large" / "finished.json").exists()
  stages.train(make_config(), tmp_path, ending(calls))
  assert calls[2:] == [("large", small)]
  finished = tmp_path / "large" / "finished.json"
  assert json.loads(finished.read_text()) == {"step": 4}
  stages.train(make_config(), tmp_path, ending(calls))
  assert len(calls) == 3


def test_a_stage_that_is_stopped_or_made_longer_is_trained(tmp_path):
  calls = []
  stages.train(make_config(), tmp_path, ending(calls, small=1))
  assert calls == [("small", None)]
  stages.train(make_config(), tmp_path, ending(calls))
  longer = make_config(init_from="elsewhere")
  longer.stages["large"].num_steps = 5
  stages.train(longer, tmp_path, ending(calls))
  assert calls[3:] == [("large", "elsewhere")]


def test_asked_to_stop_while_a_stage_exports_no_other_begins(tmp_path, caplog):
  begun = []

  def train(config, workdir, stop):
    begun.append(workdir.name)
    recipe = test_loop.make_recipe()._replace(
      export=lambda *_: test_preemption.ask_to_stop()
    )
    return loop.train(toy_config(config), workdir, recipe, stop=stop)

  before = signal.getsignal(signal.SIGTERM)
  stages.train(make_config(), tmp_path, train)
  assert begun == ["small"]
  assert "asked to stop: stage large (2 of 2) is not begun" in caplog.text
  assert (tmp_path / "small" / "finished.json").exists()
  assert signal.getsignal(signal.SIGTERM) == before
  stages.train(make_config(), tmp_path, train)
  assert begun == ["small", "large"]


def test_the_preemption_service_is_told_all_numbers_once_and_in_order(
  tmp_path, monkeypatch
):
  """Else several processes might agree on one that never comes."""
  service = test_preemption.Service(monkeypatch)
  stages.train(make_config(), tmp_path, train_toy)
  # Before a stage, and after each of its 2 or 4 steps.
  assert service.told == list(range(1, 1 + 3 + 5))
  stages.train(make_config(), tmp_path, train_toy)
  assert len(service.told) == 8


def test_what_the_processes_agreed_on_is_not_forgotten_with_the_step(
  tmp_path, monkeypatch
):
  """It may be the last of a stage."""
  monkeypatch.setattr(
    *(multihost_utils, "reached_preemption_sync_point"), lambda call: call == 3
  )
  stages.train(make_config(), tmp_path, train_toy)
  assert (tmp_path / "small" / "finished.json").exists()
  assert not (tmp_path / "large").exists()


@pytest.mark.parametrize(("when", "saved"), [("begin", 2), ("restore", 3)])
def test_several_are_asked_as_a_stage_goes_on(
  tmp_path, monkeypatch, when, saved
):
  """Before or after the one call that is no step's."""
  stages.train(make_config(), tmp_path, stop_at(2, train_toy))
  service = test_preemption.Service(monkeypatch)

  def train(config, workdir, stop):
    service.ask_to_stop()
    return train_toy(config, workdir, stop)

  if when == "begin":
    service.ask_to_stop()
  stages.train(make_config(), tmp_path, train)
  steps = [path.name for path in (tmp_path / "large" / "checkpoints").iterdir()]
  assert max(map(int, steps)) == saved
  assert not (tmp_path / "large" / "finished.json").exists()
  assert service.told == list(range(1, saved))


def end_pair(directory, when):
  """Trains in two processes, one of which is asked to stop; returns outputs."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
  pair = [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "tests.training.stages_worker"),
        *(str(process), str(port), str(directory), when),
      ],
      env=os.environ | flags,
      cwd=pathlib.Path(__file__).parents[2],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for process in range(2)
  ]
  outputs = [process.communicate(timeout=600)[0] for process in pair]
  for process, output in zip(pair, outputs, strict=True):
    assert process.returncode == 0, output
  return outputs


def assert_ends_as_undisturbed(tmp_path):
  """Goes on in `tmp_path / "stopped"`, and compares."""
  stopped = tmp_path / "stopped"
  for directory in (stopped, tmp_path / "whole"):
    stages.train(make_config(), directory, train_toy)
  for stage, steps in (("small", [1, 2]), ("large", [1, 2, 3, 4])):
    ours, theirs = (
      [json.loads(row) for row in (directory / stage / "metrics.jsonl").open()]
      for directory in (stopped, tmp_path / "whole")
    )
    assert [row["step"] for row in ours] == steps
    # Sums over devices are taken in another order in two processes.
    for a, b in zip(ours, theirs, strict=True):
      np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["step", "export"])
def test_of_two_processes_one_is_asked_to_stop_as_a_stage_ends(tmp_path, when):
  """No other begins, both end well, and a restart ends as if undisturbed."""
  stopped = tmp_path / "stopped"
  for output in end_pair(stopped, when):
    assert "asked to stop: stage large (2 of 2) is not begun" in output
  assert (stopped / "small" / "finished.json").exists()
  assert not (stopped / "large").exists()
  assert_ends_as_undisturbed(tmp_path)


@pytest.mark.slow
def test_of_two_processes_one_is_asked_to_stop_as_a_stage_goes_on(tmp_path):
  """Before any step of the two: the next is saved."""
  stages.train(make_config(), tmp_path / "stopped", stop_at(2, train_toy))
  for output in end_pair(tmp_path / "stopped", "resumed"):
    assert "asked to stop: saved step 3" in output
  assert_ends_as_undisturbed(tmp_path)


@pytest.mark.long
def test_a_stopped_chain_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
  stages.train(make_config(), tmp_path / "whole", train_one)
  stages.train(make_config(), tmp_path / "stopped", stop_at(3))
  assert not (tmp_path / "stopped" / "large" / "finished.json").exists()
  calls = []

  def train(config, workdir, stop):
    calls.append((workdir.name, config.init_from))
    return train_one(config, workdir, stop)

  stages.train(make_config(), tmp_path / "stopped", train)
  assert calls == [("large", str(tmp_path / "stopped" / "small"))]
  large = make_config().stages["large"]
  assert_equal(
    average(tmp_path / "stopped" / "large", large),
    average(tmp_path / "whole" / "large", large),
  )


@pytest.mark.slow
def test_a_stage_begins_with_the_average_of_the_one_before(tmp_path):
  config = make_config()
  config.stages["large"].optim.peak_lr = 1e-30  # Too little for any float32.
  config.stages["large"].optim.weight_decay = 0.0
  stages.train(config, tmp_path, train_one)
  assert_equal(
    average(tmp_path / "large", config.stages["large"]),
    average(tmp_path / "small", config.stages["small"]),
  )


def test_the_published_stages_follow_one_another():
  config = stages_sana_1600m.get_config("v5p-64")
  sizes = [stage.data.image_size for stage in config.stages.values()]
  assert sizes == [512, 1024, 2048, 4096]
  for stage in config.stages.values():
    assert stage.hardware.preset == "v5p-64"
    stage.data.synthetic = True
  config.freeze()


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (config_lib.StagesConfig(), "stages is empty: it needs a run"),
    (
      config_lib.StagesConfig(stages={"a/b": make_stage(4)}),
      "'a/b', which is no name of a directory",
    ),
    (
      config_lib.StagesConfig(stages={"px": make_stage(4, batch_size=0)}),
      "stage 'px': batch_size must be positive, got 0",
    ),
  ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(config, message):
  with pytest.raises(ValueError, match=message):
    config.freeze()
