"""Checkpoints: names on disk, other meshes, and readable refusals."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import checkpoint, sharding
from sana_jax.nn import layers
from sana_jax.training import step as step_lib

ROWS = (("kernel", ("embed", None)), ("bias", (None,)))


def make_state(seed: int = 0) -> step_lib.TrainState:
  line = layers.Linear(8, 3, rngs=nnx.Rngs(seed))
  line.bias[...] = jnp.arange(3.0) + seed
  return step_lib.TrainState(
    jnp.int32(seed), {"line": line}, (), (), jnp.int32(0)
  )


def abstract_state(state, mesh):
  whole = sharding.replicated(mesh)
  rows = {"line": sharding.param_shardings(state.params["line"], ROWS, mesh)}
  places = step_lib.TrainState(whole, rows, (), (), whole)
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    state,
    places,
  )


@pytest.fixture
def checkpointer(tmp_path):
  made = checkpoint.Checkpointer(tmp_path, keep=2)
  yield made
  made.close()


def test_a_state_returns_onto_the_mesh_that_is_asked_for(checkpointer):
  state = make_state(5)
  checkpointer.save(5, state)
  checkpointer.wait()
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  again = checkpointer.restore(5, abstract_state(state, mesh))
  jax.tree.map(np.testing.assert_array_equal, again, state)
  kernel = again.params["line"].kernel[...]
  assert kernel.addressable_shards[0].data.shape == (2, 3)
  assert isinstance(again.params["line"], layers.Linear)


def test_only_the_newest_checkpoints_are_kept(checkpointer, tmp_path):
  for step in (1, 2, 3):
    checkpointer.save(step, make_state(step))
  checkpointer.wait()
  assert checkpointer.latest_step() == 3
  kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert kept == {"2", "3"}


def test_saving_a_step_again_changes_nothing(checkpointer):
  checkpointer.save(1, make_state(1))
  checkpointer.save(1, make_state(2))
  checkpointer.wait()
  mesh = sharding.make_mesh({"data": -1, "fsdp": 1})
  again = checkpointer.restore(1, abstract_state(make_state(), mesh))
  assert int(again.step) == 1


def test_names_on_disk_are_those_of_the_parameters(checkpointer, tmp_path):
  checkpointer.save(1, make_state())
  checkpointer.wait()
  path = tmp_path / "checkpoints" / "1" / "state" / "_METADATA"
  tree = json.loads(path.read_text())["tree_metadata"]
  names = {"/".join(k["key"] for k in v["key_metadata"]) for v in tree.values()}
  parameters = {"params/line/kernel", "params/line/bias"}
  assert names == {"step", "skipped"} | parameters


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
  first = checkpoint.Checkpointer(tmp_path, keep=2)
  first.save(1, make_state(1))
  first.close()
  # What a killed process leaves: a directory that was not renamed yet.
  partial = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-7"
  (partial / "state").mkdir(parents=True)
  second = checkpoint.Checkpointer(tmp_path, keep=2)
  assert second.latest_step() == 1
  second.close()


def test_all_differences_are_listed(checkpointer):
  checkpointer.save(1, make_state())
  checkpointer.wait()
  wanted = {
    "step": jax.ShapeDtypeStruct((), jnp.int32),
    "params": {
      "line": {"kernel": jax.ShapeDtypeStruct((8, 4), jnp.float32)},
      "scale": jax.ShapeDtypeStruct((2,), jnp.float32),
    },
  }
  with pytest.raises(ValueError, match=r"checkpoint 1 .*3 differences") as info:
    checkpointer.restore(1, wanted)
  for part in (
    "missing params/scale (2,)",
    "unexpected params/line/bias (3,)",
    "params/line/kernel: (8, 3) on disk, (8, 4) in the config",
    "another --workdir",
  ):
    assert part in str(info.value)


def test_a_single_process_is_never_told_to_stop_by_orbax(checkpointer):
  # Which is why the loop has a signal handler of its own.
  assert not checkpointer.reached_preemption(1)
