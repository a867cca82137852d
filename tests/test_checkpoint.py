"""Checkpoints: names on disk, other meshes, and readable refusals."""

import json
import logging
import resource
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import checkpoint, sharding
from sana_jax import config as config_lib
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


def open_checkpoints(path, **config) -> checkpoint.Checkpointer:
  return checkpoint.Checkpointer(path, config_lib.CheckpointConfig(**config))


def kept(path) -> set[str]:
  return {entry.name for entry in (path / "checkpoints").iterdir()}


@pytest.fixture
def checkpointer(tmp_path):
  made = open_checkpoints(tmp_path)
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


def test_notes_return_as_they_were(checkpointer):
  notes = {"losses": [0.1, 1 / 3, 1e-300], "mean": {"first": 5}}
  checkpointer.save(5, make_state(5), notes=notes)
  checkpointer.save(6, make_state(6))
  checkpointer.wait()
  assert checkpointer.notes(5) == notes
  assert checkpointer.notes(6) == {}


def test_only_the_newest_checkpoints_are_kept(checkpointer, tmp_path):
  for step in (1, 2, 3):
    checkpointer.save(step, make_state(step))
  checkpointer.wait()
  assert checkpointer.latest_step() == 3
  assert checkpointer.steps() == [2, 3]
  assert kept(tmp_path) == {"2", "3"}


def test_permanent_and_best_checkpoints_stay_beside_the_newest(tmp_path):
  losses = {1: 0.3, 2: 0.1, 3: 0.5, 4: 0.9, 5: 0.2, 6: 0.8, 7: 0.7}
  made = open_checkpoints(tmp_path, keep=1, keep_every=4, keep_best=2)
  for step, loss in losses.items():
    made.save(step, make_state(step), {"loss": loss, "psnr": 1.0})
  made.wait()
  assert kept(tmp_path) == {"2", "5", "4", "7"}
  made.close()
  # The values are on disk: a resumed run knows them.
  again = open_checkpoints(tmp_path, keep=1, keep_every=4, keep_best=2)
  again.save(8, make_state(8), {"loss": 0.05})
  again.save(9, make_state(9), {"loss": 1.0})
  again.wait()
  assert kept(tmp_path) == {"8", "2", "4", "9"}
  again.close()


def test_the_best_may_be_the_greatest(tmp_path):
  made = open_checkpoints(
    tmp_path, keep=1, keep_best=1, best_metric="psnr", best_mode="max"
  )
  for step, psnr in {1: 3.0, 2: 9.0, 3: 5.0}.items():
    made.save(step, make_state(step), {"psnr": psnr})
  made.wait()
  assert kept(tmp_path) == {"2", "3"}
  with pytest.raises(ValueError, match="best_metric 'psnr' .* there are loss"):
    made.save(4, make_state(4), {"loss": 1.0})
  made.close()


@pytest.fixture
def full_disk():
  """Yields a function after which files of this process stay small."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_fails_in_the_background_is_an_error_at_the_next_poll(
  tmp_path, full_disk, caplog, rng
):
  made = open_checkpoints(tmp_path)
  with caplog.at_level(logging.INFO, logger="absl"):
    made.save(1, make_state(1))
    made.wait()
  assert "saved checkpoint 1 in" in caplog.text
  large = {"w": jnp.asarray(rng.normal(size=(300, 300)))}
  full_disk()

  def save_and_poll():
    made.save(2, large)
    while True:
      made.poll()
      time.sleep(0.01)

  with pytest.raises(OSError, match="checkpoint 2 .*File too large.* intact"):
    save_and_poll()
  assert made.steps() == [1]


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
  assert names == {
    *("step", "skipped", "params/line/kernel", "params/line/bias"),
  }


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
  first = open_checkpoints(tmp_path)
  first.save(1, make_state(1))
  first.close()
  # What a killed process leaves: a directory that was not renamed yet.
  partial = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-7"
  (partial / "state").mkdir(parents=True)
  second = open_checkpoints(tmp_path)
  assert second.latest_step() == 1
  second.close()


def test_all_differences_are_listed(checkpointer):
  checkpointer.save(1, make_state())
  checkpointer.wait()
  wanted = {
    "step": jax.ShapeDtypeStruct((), jnp.int32),
    "skipped": jax.ShapeDtypeStruct((), jnp.int32),
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


def test_orbax_says_nothing_but_warnings():
  """In a process of its own: the handler is everyone's."""
  program = (
    "import sys, jax.numpy as jnp\n"
    "from absl import logging\n"
    "from sana_jax import checkpoint, config\n"
    "logging.set_verbosity(logging.INFO)\n"
    "logging.use_absl_handler()\n"
    "checkpoint.quiet_orbax()\n"
    "saver = checkpoint.Checkpointer(sys.argv[1], config.CheckpointConfig())\n"
    "saver.save(1, {'w': jnp.ones(2)})\n"
    "saver.close()\n"
    "logging.info('the command speaks')\n"
  )
  with tempfile.TemporaryDirectory() as directory:
    done = subprocess.run(
      [sys.executable, "-c", program, directory],
      check=True,
      capture_output=True,
      text=True,
    )
  lines = [line for line in done.stderr.splitlines() if line.startswith("I")]
  assert len(lines) == 1
  assert lines[0].endswith("the command speaks")
