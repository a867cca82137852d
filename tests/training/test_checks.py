"""What cannot be is said at once, and leaves no trace."""

import logging

import pytest

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.training import checks, loop
from tests.training import test_loop


@pytest.fixture
def warnings(caplog):
  caplog.set_level(logging.WARNING, logger="absl")

  def found():
    return [record.getMessage() for record in caplog.records]

  return found


def test_a_batch_must_spread_over_devices_and_parts():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  config = config_lib.TrainConfig(batch_size=48)
  checks.check_batch(config, mesh)
  config.optim.accumulation = 4
  with pytest.raises(
    ValueError,
    match=r"\(48\) must be a multiple of data=2 x fsdp=4 x optim.acc.*=4\.$",
  ):
    checks.check_batch(config, mesh)
  config.hardware.preset = "v5e-8"
  with pytest.raises(ValueError, match="preset v5e-8 chose .*accumulation"):
    checks.check_batch(config, mesh)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch_size": 12}, r"batch_size \(12\) must be"),
    ({"mesh": {"data": 5}}, "does not fit 8 devices"),
    ({"mesh": {"fsdp": 8, "data": 1}}, None),
  ],
)
def test_what_cannot_be_leaves_the_directory_alone(tmp_path, changes, message):
  workdir = tmp_path / "run"
  config = test_loop.make_config(num_steps=1, **changes)
  if message is None:
    loop.train(config, workdir, test_loop.make_recipe())
    assert (workdir / "config.json").exists()
    return
  with pytest.raises(ValueError, match=message):
    loop.train(config, workdir, test_loop.make_recipe())
  assert not workdir.exists()


def test_what_a_run_begins_with_is_checked_first(tmp_path):
  def refuse(abstract):
    raise ValueError("another model")

  recipe = test_loop.make_recipe()._replace(initial=refuse)
  workdir = tmp_path / "run"
  with pytest.raises(ValueError, match="another model"):
    loop.train(test_loop.make_config(), workdir, recipe)
  assert not workdir.exists()


def test_a_step_that_cannot_be_traced_ends_before_the_state_exists(tmp_path):
  recipe = test_loop.make_recipe()
  made = []

  def init(key):
    made.append(key)
    return recipe.init(key)

  def wrong(params, frozen, key, batch):
    raise ValueError("these heads do not divide")

  with pytest.raises(ValueError, match="these heads do not divide"):
    loop.train(
      test_loop.make_config(),
      tmp_path,
      recipe._replace(init=init, loss_fn=wrong),
    )
  # For the shapes alone.
  assert len(made) == 1


def test_a_run_that_is_past_its_end_is_refused(tmp_path):
  loop.train(test_loop.make_config(), tmp_path, test_loop.make_recipe())
  with pytest.raises(
    ValueError, match=r"num_steps \(8\) is less .*checkpoint is of step 12"
  ):
    loop.train(
      test_loop.make_config(num_steps=8), tmp_path, test_loop.make_recipe()
    )


@pytest.mark.parametrize(
  ("steps", "latest", "message"),
  [
    ((5, 7), None, None),
    ((5, 12), None, "=5:12, but the steps of this run are 1 to 10: not all"),
    ((11, 12), None, "=11:12, but the steps of this run are 1 to 10: none"),
    ((5, 7), 6, "=5:7, but the steps of this run are 7 to 10: not all"),
    ((5, 7), 7, "=5:7, but the steps of this run are 8 to 10: none"),
    ((5, 7), 10, None),
  ],
)
def test_steps_that_will_not_be_profiled_are_told(
  warnings, steps, latest, message
):
  config = config_lib.TrainConfig(num_steps=10)
  config.optim.warmup_steps = 9
  checks.warn_of_length(config, latest, steps)
  assert len(warnings()) == (message is not None)
  assert message is None or message in warnings()[0]


def test_a_warm_up_that_never_ends_is_told(warnings):
  config = config_lib.TrainConfig(num_steps=10)
  config.optim.warmup_steps = 10
  checks.warn_of_length(config, None, None)
  (line,) = warnings()
  assert "optim.warmup_steps (10) is not less than num_steps (10)" in line
