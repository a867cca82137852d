"""Bytes by category: shards, not global sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax import sharding
from sana_jax.training import budget
from sana_jax.training import step as step_lib


def test_a_device_holds_its_shards_and_whole_copies_of_the_rest():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  place = NamedSharding(mesh, PartitionSpec("fsdp"))
  leaves = {
    "sharded": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=place),
    "half": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16, sharding=place),
    "copied": jax.ShapeDtypeStruct(
      (5,), jnp.float32, sharding=sharding.replicated(mesh)
    ),
    "unplaced": jax.ShapeDtypeStruct((3,), jnp.int8),
    "numpy": np.zeros(2, np.float64),
  }
  assert budget.per_device_bytes(leaves) == 48 + 24 + 20 + 3 + 16


def test_the_budget_is_what_the_arrays_of_a_state_take_on_a_device():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  place = NamedSharding(mesh, PartitionSpec("fsdp"))
  params = {"w": jax.device_put(jnp.ones((8, 6)), place)}
  state = step_lib.init_state(params, optax.adam(1e-3))
  found = budget.state_budget(state)
  device = jax.devices()[0]
  held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(state.opt_state)
    for shard in leaf.addressable_shards
    if shard.device == device
  )
  assert found == {"parameters": 48, "average": 48, "optimiser": held}
  without = step_lib.init_state(params, optax.adam(1e-3), averages=False)
  assert budget.state_budget(without) == found | {"average": 0}
