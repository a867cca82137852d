"""The loop, on a recipe small enough to see through."""

import itertools
import json
import logging

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from sana_jax import checkpoint
from sana_jax import config as config_lib
from sana_jax.data import loader
from sana_jax.nn import layers
from sana_jax.training import budget, loop
from sana_jax.training import recipe as recipe_lib
from sana_jax.training import workdir as workdir_lib

AXES = (("kernel", ("embed", None)), ("bias", (None,)))


def make_recipe(exports=None):
  """Regresses y = 3 x with noise drawn from the step's key."""

  def loss_fn(params, frozen, key, batch):
    noise = 0.01 * jax.random.normal(key, batch["x"].shape)
    error = params["line"](batch["x"] + noise) - frozen["slope"] * batch["x"]
    return jnp.square(error).mean(), {"bias": params["line"].bias[...].sum()}

  def example(x, rng):
    return {"x": np.float32([x, rng.normal()] * 4)}

  dataset = (
    grain.MapDataset.source(np.linspace(-1, 1, 50))
    .seed(7)
    .shuffle()
    .repeat()
    .random_map(example)
  )
  return recipe_lib.Recipe(
    init=lambda key: {"line": layers.Linear(8, 8, rngs=nnx.Rngs(key))},
    param_axes={"line": AXES},
    frozen={"slope": np.float32(3.0)},
    loss_fn=loss_fn,
    batches=loader.example_batches(dataset, 8),
    sample=lambda params, frozen: np.full((4, 6, 3), 200, np.uint8),
    export=lambda params, frozen, path: (
      exports.append(path) if exports is not None else None
    ),
  )


def make_config(**changes):
  config = config_lib.TrainConfig(
    num_steps=12,
    batch_size=8,
    log_every=2,
    checkpoint=config_lib.CheckpointConfig(every=4),
    sample_every=6,
    ema_decay=0.9,
  )
  config.optim.warmup_steps = 2
  config.optim.peak_lr = 0.05
  for name, value in changes.items():
    setattr(config, name, value)
  return config


def assert_states_equal(a, b, **tolerance):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(
      np.asarray(x), np.asarray(y), **tolerance
    ),
    a,
    b,
  )


def test_training_lowers_the_loss_and_leaves_its_traces(tmp_path):
  exports = []
  loop.train(make_config(num_steps=60), tmp_path, make_recipe(exports))
  rows = [
    json.loads(row)
    for row in (tmp_path / "metrics.jsonl").read_text().splitlines()
  ]
  assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
  assert [row["step"] for row in rows] == list(range(2, 61, 2))
  assert (tmp_path / "samples" / "step_0000060.png").exists()
  assert list((tmp_path / "tensorboard").iterdir())
  assert exports == [tmp_path / "export"]


def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(tmp_path):
  whole = loop.train(make_config(), tmp_path / "whole", make_recipe())
  loop.train(make_config(num_steps=4), tmp_path / "parts", make_recipe())
  parts = loop.train(make_config(), tmp_path / "parts", make_recipe())
  assert int(parts.step) == 12
  assert_states_equal(whole, parts, rtol=0)


def test_sharding_does_not_change_the_training(tmp_path):
  data = loop.train(make_config(), tmp_path / "data", make_recipe())
  fsdp = loop.train(
    make_config(mesh={"data": 2, "fsdp": 4}), tmp_path / "fsdp", make_recipe()
  )
  kernel = fsdp.params["line"].kernel[...]
  assert kernel.addressable_shards[0].data.shape == (2, 8)
  moment = fsdp.opt_state[1][0].mu["line/kernel"]
  assert moment.sharding == kernel.sharding
  # Sums over devices are taken in another order.
  assert_states_equal(data, fsdp, rtol=2e-5, atol=1e-6)


def test_a_state_on_the_host_changes_nothing(tmp_path):
  """Neither numbers nor pictures, and it may begin in the middle of a run."""
  exported = []
  recipe = make_recipe()._replace(
    export=lambda params, frozen, path: exported.append(params)
  )
  mesh = {"data": 2, "fsdp": 4}
  loop.train(make_config(num_steps=4, mesh=mesh), tmp_path / "a", recipe)
  config = make_config(mesh=mesh)
  config.hardware.offload = ("optimizer", "average")
  state = loop.train(config, tmp_path / "a", recipe)
  moment = state.opt_state[1][0].mu["line/kernel"]
  kernel = state.params["line"].kernel[...]
  assert moment.sharding == kernel.sharding.with_memory_kind("pinned_host")
  assert state.ema["line"].kernel[...].sharding == moment.sharding
  assert budget.state_budget(state)["average"] == 0
  assert budget.host_bytes(state.ema) == 4 * (64 // 4 + 8)
  whole = loop.train(make_config(mesh=mesh), tmp_path / "b", make_recipe())
  assert_states_equal(state, whole, rtol=0)
  average = exported[-1]["line"].kernel[...]
  assert average.sharding.memory_kind == "device"
  np.testing.assert_array_equal(average, whole.ema["line"].kernel[...])
  pictures = {path.name for path in (tmp_path / "a" / "samples").iterdir()}
  assert {"step_0000012.png", "step_0000012_raw.png"} <= pictures


def test_a_checkpoint_moves_to_another_mesh(tmp_path):
  loop.train(
    make_config(num_steps=4, mesh={"data": 1, "fsdp": 8}),
    tmp_path / "moved",
    make_recipe(),
  )
  moved = loop.train(make_config(), tmp_path / "moved", make_recipe())
  whole = loop.train(make_config(), tmp_path / "whole", make_recipe())
  assert_states_equal(whole, moved, rtol=2e-5, atol=1e-6)


def test_another_config_is_refused_by_name(tmp_path):
  loop.train(make_config(num_steps=2), tmp_path, make_recipe())
  other = make_config(num_steps=2, batch_size=16)
  with pytest.raises(ValueError, match="differing: batch_size"):
    loop.train(other, tmp_path, make_recipe())


def test_a_run_without_a_checkpoint_may_be_begun_with_another_config(
  tmp_path, caplog
):
  """The first one fails in its first steps; nothing was learned."""

  def batches(host, first_step):
    raise OSError("no data today")
    yield

  with pytest.raises(OSError, match="no data today"):
    loop.train(
      make_config(batch_size=16),
      tmp_path,
      make_recipe()._replace(batches=batches),
    )
  with caplog.at_level(logging.INFO, logger="absl"):
    loop.train(make_config(num_steps=2), tmp_path, make_recipe())
  assert "has no checkpoint: whatever run began there" in caplog.text
  config = json.loads((tmp_path / "config.json").read_text())
  assert config["batch_size"] == 8
  with pytest.raises(ValueError, match="differing: batch_size"):
    loop.train(make_config(batch_size=16), tmp_path, make_recipe())


def test_a_run_without_an_average_has_none_anywhere(tmp_path, caplog):
  """Not in the state, on disk, or as a second picture; parameters stand in."""
  exported = []
  recipe = make_recipe()._replace(
    export=lambda params, frozen, path: exported.append(params)
  )
  config = make_config(ema_decay=0.0)
  part = make_config(ema_decay=0.0, num_steps=4)
  loop.train(part, tmp_path, make_recipe())
  state = loop.train(config, tmp_path, recipe)
  assert state.ema is None
  assert_states_equal(exported, [state.params], rtol=0)
  saved = tmp_path / "checkpoints" / "12" / "state"
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    names = set(reader.metadata(saved).item_metadata.tree)
  assert names == {"step", "params", "opt_state", "skipped"}
  pictures = {path.name for path in (tmp_path / "samples").iterdir()}
  assert pictures == {f"step_00000{n}.png" for n in ("04", "06", "12")}
  caplog.clear()
  restored = checkpoint.restore_average(tmp_path, state.params)
  assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
  assert_states_equal(restored, state.params, rtol=0)
  kept = loop.train(make_config(), tmp_path / "kept", make_recipe())
  assert_states_equal(kept.params, state.params, rtol=1e-6, atol=1e-7)


def test_a_batch_that_does_not_divide_is_an_error(tmp_path):
  with pytest.raises(ValueError, match=r"batch_size \(12\).*data=8"):
    loop.train(make_config(batch_size=12), tmp_path, make_recipe())


def test_a_changed_model_is_reported_leaf_by_leaf(tmp_path):
  loop.train(make_config(num_steps=2), tmp_path, make_recipe())
  wider = make_recipe()._replace(
    init=lambda key: {
      "line": layers.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(key))
    }
  )
  with pytest.raises(ValueError, match=r"unexpected params/line/bias"):
    loop.train(make_config(), tmp_path, wider)


def test_the_weights_of_sources_may_change_and_nothing_else_of_them(tmp_path):
  def config(*weights, path="a"):
    sources = tuple(
      config_lib.SourceConfig(path=path, weight=weight) for weight in weights
    )
    return make_config(data=config_lib.DataConfig(sources=sources))

  workdir_lib.claim(config(1.0, 2.0), tmp_path, has_learned=True)
  workdir_lib.claim(config(1.5, 0.1), tmp_path, has_learned=True)
  with pytest.raises(
    ValueError, match=r"data.sources.0.path \(a there, b here"
  ):
    workdir_lib.claim(config(1.0, 2.0, path="b"), tmp_path, has_learned=True)
  with pytest.raises(ValueError, match=r"data.sources.2.path \(None there"):
    workdir_lib.claim(config(1.0, 2.0, 3.0), tmp_path, has_learned=True)


def test_a_run_of_a_version_without_some_fields_goes_on(tmp_path):
  path = tmp_path / "config.json"
  workdir_lib.claim(make_config(), tmp_path, has_learned=True)
  values = json.loads(path.read_text())
  del values["data"]["max_buckets"]
  path.write_text(json.dumps(values))
  workdir_lib.claim(make_config(), tmp_path, has_learned=True)
  path.write_text(json.dumps(values))
  other = make_config(data=config_lib.DataConfig(max_buckets=3))
  with pytest.raises(ValueError, match=r"max_buckets \(10 there, 3 here\)"):
    workdir_lib.claim(other, tmp_path, has_learned=True)


def test_each_shape_of_batches_is_compiled_once(tmp_path, caplog):
  """Steps of two shapes take turns; both are announced, neither twice."""
  recipe = make_recipe()

  def batches(host, first_step):
    for step in itertools.count(first_step):
      rows = np.random.default_rng(step).normal(size=(8, 1 + step % 2, 8))
      yield {"x": rows.astype(np.float32)}

  recipe = recipe._replace(batches=batches, num_shapes=2)
  with caplog.at_level(logging.INFO, logger="absl"):
    loop.train(make_config(), tmp_path, recipe)
  lines = [record.getMessage() for record in caplog.records]
  assert [line for line in lines if "compiling" in line] == [
    "compiling for 8x1x8 (1 of 2 shapes)",
    "compiling for 8x2x8 (2 of 2 shapes)",
  ]
  assert not [line for line in lines if "programs" in line]


def test_interruptions_do_not_change_which_checkpoints_are_the_best(tmp_path):
  def train(path, num_steps):
    config = make_config(num_steps=num_steps)
    config.checkpoint.keep, config.checkpoint.keep_best = 1, 2
    # The loss falls, so that the first windows are the "best".
    config.checkpoint.best_mode = "max"
    loop.train(config, path, make_recipe())

  train(tmp_path / "whole", 16)
  for num_steps in (3, 6, 7, 13, 16):
    train(tmp_path / "parts", num_steps)
  found = [
    {
      step: json.loads((path / str(step) / "metrics" / "metrics").read_text())
      for step in checkpoint.saved_steps(path.parent)
    }
    for path in (tmp_path / n / "checkpoints" for n in ("whole", "parts"))
  ]
  assert set(found[0]) == {4, 8, 16}
  assert found[0] == found[1]


def test_a_best_metric_that_is_not_measured_is_an_error(tmp_path):
  config = make_config()
  config.checkpoint.keep_best = 1
  config.checkpoint.best_metric = "los"
  with pytest.raises(ValueError, match="'los' is not measured; .*grad_norm"):
    loop.train(config, tmp_path, make_recipe())
