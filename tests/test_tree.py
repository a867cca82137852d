"""Names of leaves: stable, because tables and files use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import tree
from sana_jax.nn import layers
from sana_jax.training import step as step_lib


def make_pair() -> nnx.List:
  rngs = nnx.Rngs(0)
  return nnx.List([layers.Linear(2, 3, rngs=rngs) for _ in range(2)])


def test_names_are_attribute_paths_without_flax_keys():
  assert tree.leaf_names({"pair": make_pair()}) == [
    "pair/0/bias",
    "pair/0/kernel",
    "pair/1/bias",
    "pair/1/kernel",
  ]


def test_a_parameter_may_be_called_value():
  # Only the last part is Flax's own, and never the only part.
  assert tree.leaf_names({"value": {"kernel": 1}}) == ["value/kernel"]
  assert tree.leaf_names({"value": 1}) == ["value"]


def test_names_follow_the_order_of_the_leaves():
  seen = tree.map_with_names(lambda name, leaf: (name, leaf.shape), make_pair())
  pairs = jax.tree.leaves(seen, is_leaf=lambda x: isinstance(x, tuple))
  assert [name for name, _ in pairs] == tree.leaf_names(make_pair())
  assert dict(pairs)["0/kernel"] == (2, 3)


def test_a_name_matches_when_one_pattern_is_found_in_it():
  assert tree.matches("transformer/head/bias", ("^head", "bias$"))
  assert not tree.matches("transformer/head/bias", ("^head", "kernel"))
  assert not tree.matches("transformer/head/bias", ())


def test_nested_dicts_and_back(rng):
  state = step_lib.TrainState(
    jnp.int32(3),
    {"line": make_pair()},
    {"line": make_pair()},
    (rng.random(2),),
    jnp.int32(0),
  )
  nested = tree.to_nested_dict(state)
  assert nested["params"]["line"]["1"]["kernel"].shape == (2, 3)
  again = tree.from_nested_dict(nested, like=state)
  assert jax.tree.structure(again) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, again, state)


def test_a_missing_name_is_an_error():
  with pytest.raises(KeyError, match="kernel"):
    tree.from_nested_dict({"0": {"bias": 1}}, like=make_pair())
