"""Memory that runs out ends in a budget and a few things to try."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.training import loop, out_of_memory
from sana_jax.training import step as step_lib
from tests.pipeline import test_pipeline_out_of_memory
from tests.training import test_loop


def too_large(x):
  # Sorted, so that it must be stored: 2^50 bytes.
  return jnp.sort(jnp.arange(2**48, dtype=jnp.float32) * x)[0]


def test_a_step_that_does_not_fit_is_explained(tmp_path):
  recipe = test_loop.make_recipe()

  def hungry(params, frozen, key, batch):
    loss, scalars = recipe.loss_fn(params, frozen, key, batch)
    return loss + too_large(jax.lax.stop_gradient(loss)), scalars

  with pytest.raises(MemoryError) as info:
    loop.train(
      test_loop.make_config(), tmp_path, recipe._replace(loss_fn=hungry)
    )
  text = str(info.value)
  assert text.startswith("the step does not fit the memory of a device")
  for part in (
    *("parameters", "average", "optimiser", "gradients", "fixed parts"),
    *("batch", "--config.batch_size", "--config.remat=offload"),
    *("(now 'full')", "--config.hardware.offload"),
    *("--config.mesh.fsdp", "XLA: RESOURCE_EXHAUSTED"),
  ):
    assert part in text
  assert len(text.splitlines()) < 20


def advice(batch_size, accumulation, remat):
  """What is offered when a step of this config does not fit two devices."""
  config = test_loop.make_config(batch_size=batch_size, remat=remat)
  config.optim.accumulation = accumulation
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
  step = out_of_memory.STEP
  with (
    pytest.raises(MemoryError) as info,
    out_of_memory.explained(step, lambda: {"all": 1}, config, mesh),
  ):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much")
  return str(info.value).split("cheapest first:\n")[1]


def test_what_changes_nothing_in_a_run_is_offered_first():
  first, *_ = advice(16, 2, "none").split("  2. ")
  assert "--config.optim.accumulation (now 2," in first
  assert "4 pictures of a part" in first
  assert "batch_size" not in first


@pytest.mark.parametrize(
  ("remat", "offered"),
  [
    ("none", ("=full", "offload,")),
    ("dots", ("=full", "offload,")),
    ("full", ("=offload",)),
    ("offload", ()),
  ],
)
def test_what_is_turned_already_is_not_offered(remat, offered):
  text = advice(16, 2, remat)
  assert all(option in text for option in offered)
  assert ("remat=full" in text) == ("=full" in offered)
  assert ("--config.remat" in text) == bool(offered)
  # One picture a part: no more parts can be.
  assert "accumulation" not in advice(16, 8, remat)


def test_a_state_that_does_not_fit_is_explained(tmp_path):
  recipe = test_loop.make_recipe()

  def init(key):
    model = recipe.init(key)
    kernel = model["line"].kernel
    kernel[...] = kernel[...] + too_large(jax.random.uniform(key))
    return model

  with pytest.raises(MemoryError) as info:
    loop.train(test_loop.make_config(), tmp_path, recipe._replace(init=init))
  text = str(info.value)
  assert text.startswith("the state of the run does not fit the memory of a de")
  for part in ("average", "more --config.mesh.fsdp", "(now 0.9)"):
    assert part in text
  assert "batch_size" not in text


def test_samples_that_do_not_fit_are_explained(tmp_path):
  def sample(params, frozen):
    return np.asarray(jax.jit(too_large)(params["line"].bias.sum()))

  recipe = test_loop.make_recipe()._replace(sample=sample)
  with pytest.raises(MemoryError) as info:
    loop.train(test_loop.make_config(), tmp_path, recipe)
  text = str(info.value)
  assert text.startswith("the state and samples beside it do not fit")
  for part in ("the model beside it", "sample_prompts", "sample_every"):
    assert part in text


def test_xla_is_quoted_where_a_pipeline_has_a_report_of_its_own(tmp_path):
  def sample(params, frozen):
    raise test_pipeline_out_of_memory.error_of("decoder")

  recipe = test_loop.make_recipe()._replace(sample=sample)
  with pytest.raises(MemoryError) as info:
    loop.train(test_loop.make_config(), tmp_path, recipe)
  text = str(info.value)
  assert text.startswith("the state and samples beside it do not fit")
  assert "\nXLA: RESOURCE_EXHAUSTED: x\n" in text


def test_an_export_that_does_not_fit_is_explained_and_nothing_lost(tmp_path):
  def export(params, frozen, path):
    jax.block_until_ready(jax.jit(too_large)(params["line"].bias.sum()))

  recipe = test_loop.make_recipe()
  config = test_loop.make_config()
  with pytest.raises(MemoryError) as info:
    loop.train(config, tmp_path, recipe._replace(export=export))
  text = str(info.value)
  assert text.startswith("the state and the export beside it do not fit")
  for part in ("the model beside it", "step 12 is saved", "mesh.fsdp"):
    assert part in text
  written = []
  again = test_loop.make_recipe(written)
  assert int(loop.train(config, tmp_path, again).step) == 12
  assert written == [tmp_path / "export"]


def test_what_xla_says_a_tpu_needs_gives_the_temporaries():
  state = step_lib.TrainState(
    *(np.int32(0), {"w": np.zeros((1024, 1024, 256), np.float32)}),
    *({"w": np.zeros((1024, 1024, 256), np.float32)}, {}, np.int32(0)),
  )
  batch = {"x": np.zeros((1024, 1024, 64), np.float32)}
  message = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used 26.25G of 15.75G hbm. Exceeded hbm capacity by "
    "10.50G.\n\nTotal hbm usage >= 26.25G: many pages\n"
  )
  parts = out_of_memory.of_step(state, {}, batch)
  lines = out_of_memory.describe("it does", message, parts).splitlines()
  rows = dict(line.split(maxsplit=1)[::-1] for line in lines[1:-1])
  assert rows == {
    "parameters": "1.00",
    "average": "1.00",
    "optimiser": "0.00",
    "gradients": "1.00",
    "fixed parts": "0.00",
    "batch": "0.25",
    "activations and other temporaries": "23.00",
    "in all": "26.25",
  }
  assert lines[-1].startswith("XLA: RESOURCE_EXHAUSTED: XLA:TPU compile")
  assert "many pages" not in lines[-1]


def test_other_errors_stay_what_they_are(tmp_path):
  def wrong(params, frozen, key, batch):
    raise TypeError("not about memory")

  recipe = test_loop.make_recipe()._replace(loss_fn=wrong)
  with pytest.raises(TypeError, match="not about memory"):
    loop.train(test_loop.make_config(), tmp_path, recipe)
