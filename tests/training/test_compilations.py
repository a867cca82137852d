"""One program per shape, and none that nobody asked for."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import sharding
from sana_jax.training import compilations


def make_steps(num_shapes=3):
  step = jax.jit(lambda state, batch: (state + 1, batch["x"].sum()))
  return compilations.Steps(step, num_shapes, compilations.name_leaves)


def test_each_shape_is_compiled_and_announced_once(rng, caplog):
  steps = make_steps()
  with caplog.at_level(logging.INFO, logger="absl"):
    for n in (2, 3, 2, 3):
      batch = {"x": rng.normal(size=n).astype(np.float32)}
      if steps.is_new(batch):
        steps.compile(np.float32(0), batch)
      state, total = steps(np.float32(n), batch)
      assert float(state) == n + 1
      # Float32, another order.
      np.testing.assert_allclose(total, batch["x"].sum(), rtol=1e-5, atol=1e-6)
  lines = [record.getMessage() for record in caplog.records]
  assert [line for line in lines if "compiling" in line] == [
    "compiling for 2 (1 of 3 shapes)",
    "compiling for 3 (2 of 3 shapes)",
  ]


def test_a_step_never_compiles_by_itself(rng):
  """Another type, or another sharding, of a known shape is an error."""
  steps = make_steps()
  mesh = sharding.make_mesh({"data": 8})
  x = rng.normal(size=8).astype(np.float32)
  batch = {"x": jax.device_put(x, sharding.batch_sharding(mesh))}
  steps.compile(jnp.float32(0), batch)
  steps(jnp.float32(0), batch)
  with pytest.raises(TypeError, match=r"compiled for 8 is called(.|\n)*int32"):
    steps(jnp.float32(0), {"x": batch["x"].astype(jnp.int32)})
  moved = {"x": jax.device_put(x, sharding.replicated(mesh))}
  with pytest.raises(TypeError, match=r"something else(.|\n)*batch"):
    steps(jnp.float32(0), moved)


def test_a_batch_is_named_by_its_arrays():
  batch = {"a": np.zeros((2, 3)), "b": np.zeros(5)}
  assert compilations.name_leaves(batch) == "2x3, 5"
