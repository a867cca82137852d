"""The state of an optimiser is sharded like its parameters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.training import program as program_lib

AXES = {
  "m": (
    ("^blocks/up$", ("layers", "embed", "mlp")),
    ("^blocks/down$", ("layers", "mlp", "embed")),
    ("^blocks/square$", ("layers", "embed", "heads")),
    ("^blocks/bias$", ("layers", None)),
    ("^head$", ("embed", None)),
  )
}
# What optimisers treat apart: factors from 128 on, blocks of 8 bits from
# 16384 elements on, square matrices, and more layers than columns.
SHAPES = {
  "blocks/up": (2, 128, 136),
  "blocks/down": (2, 136, 128),
  "blocks/square": (2, 128, 128),
  "blocks/bias": (2, 136),
  "head": (128, 3),
}


def init(key):
  del key
  rng = np.random.default_rng(5)
  return {
    "m": {
      name: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32)
      for name, shape in SHAPES.items()
    }
  }


def loss_fn(params, frozen, key, batch):
  """Two residual blocks and a head."""
  x, m = batch["x"], params["m"]
  for layer in range(2):
    x = jnp.tanh(x @ m["blocks/square"][layer])
    hidden = jnp.tanh(x @ m["blocks/up"][layer] + m["blocks/bias"][layer][None])
    x = x + hidden @ m["blocks/down"][layer]
  return jnp.square(x @ m["head"] - batch["y"]).mean(), {}


def make_program(name, devices, mesh_axes, **changes):
  config = config_lib.TrainConfig(num_steps=10, batch_size=8)
  config.optim = config_lib.OptimConfig(
    name=name, warmup_steps=2, peak_lr=1e-4, clip_norm=1.0, **changes
  )
  mesh = sharding.make_mesh(mesh_axes, jax.devices()[:devices])
  program = program_lib.make_program(
    config, init=init, param_axes=AXES, loss_fn=loss_fn, mesh=mesh
  )
  return program, mesh


@pytest.mark.parametrize("name", config_lib.optim.OPTIMIZERS)
def test_no_device_holds_a_copy_of_the_state_of_a_matrix(name):
  program, _ = make_program(name, 8, {"data": 1, "fsdp": 8})
  bytes_whole = bytes_here = 0
  for leaf in jax.tree.leaves(program.state.opt_state):
    here = math.prod(leaf.sharding.shard_shape(leaf.shape))
    bytes_whole += leaf.size * leaf.dtype.itemsize
    bytes_here += here * leaf.dtype.itemsize
    if leaf.size > 2 * 3 * 136:
      assert here == leaf.size // 8, (leaf.shape, leaf.sharding.spec)
  # Means over the sharded axis, and biases, are whole everywhere; Adafactor
  # has little else.
  assert bytes_here < (0.6 if name == "adafactor" else 0.2) * bytes_whole


@pytest.mark.parametrize(
  ("name", "field", "specs"),
  [
    (
      "came",
      "row",
      {"up": (None, "fsdp"), "down": (), "square": (None, "fsdp")},
    ),
    ("came", "column", {"up": (), "down": (None, "fsdp"), "square": ()}),
    # Optax calls the mean over the longer axis the row.
    ("adafactor", "v_row", {"up": (None, "fsdp"), "down": (None, "fsdp")}),
    ("adafactor", "v_col", {"up": (), "down": (), "square": ()}),
    (
      "came_8bit",
      "scale",
      {"up": (None, "fsdp"), "down": (None, None, "fsdp")},
    ),
    (
      "came_8bit",
      "codes",
      {"up": (None, "fsdp"), "down": (None, None, "fsdp")},
    ),
  ],
)
def test_means_and_blocks_lose_the_axis_they_run_along(name, field, specs):
  program, mesh = make_program(name, 8, {"data": 1, "fsdp": 8})
  found = {}
  for path, leaf in jax.tree_util.tree_flatten_with_path(
    program.state.opt_state
  )[0]:
    text = jax.tree_util.keystr(path, simple=True, separator="/")
    for short in specs:
      if f"m/blocks/{short}" in text and field in text.split("/"):
        found[short] = leaf.sharding
  assert found.keys() == specs.keys()
  for short, entries in specs.items():
    assert found[short].spec == jax.sharding.PartitionSpec(*entries), short


@pytest.mark.parametrize(
  ("name", "mesh_axes"),
  [
    *(("adafactor", {"data": 2, "fsdp": 4}), ("came", {"data": 1, "fsdp": 8})),
    *(("came_8bit", {"data": 2, "fsdp": 4}), ("muon", {"data": 1, "fsdp": 8})),
  ],
)
def test_training_with_a_sharded_state_is_training_on_one_device(
  rng, name, mesh_axes
):
  batch = {
    "x": rng.normal(size=(8, 128)).astype(np.float32),
    "y": rng.normal(size=(8, 3)).astype(np.float32),
  }
  losses = []
  for devices, axes in ((1, {"data": 1, "fsdp": 1}), (8, mesh_axes)):
    program, mesh = make_program(name, devices, axes, accumulation=2)
    place = sharding.batch_sharding(mesh)
    placed = jax.tree.map(lambda x, p=place: jax.device_put(x, p), batch)
    state = program.init(jax.random.key(3))
    told = []
    for _ in range(6):
      state, scalars = program.step(state, {}, jax.random.key(0), placed)
      told.append(float(scalars["loss"]))
    assert program.step._cache_size() == 1
    jax.tree.map(
      lambda leaf, expected: np.testing.assert_equal(
        leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim), True
      ),
      state,
      program.state,
    )
    losses.append(told)
  assert losses[0][-1] < losses[0][0]
  # Sums over devices are taken in another order; a code of 8 bits may then
  # round to its neighbour.
  np.testing.assert_allclose(*losses, rtol=1e-3 if "8bit" in name else 2e-5)


def test_counts_are_on_every_device():
  program, mesh = make_program("adamw", 8, {"data": 2, "fsdp": 4})
  whole = sharding.replicated(mesh)
  counts = [x for x in jax.tree.leaves(program.state.opt_state) if not x.ndim]
  assert len(counts) == 2
  assert {leaf.sharding for leaf in counts} == {whole}
  assert program.state.skipped.sharding == whole
