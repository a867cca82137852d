"""One program per shape, and a word when there are more."""

import logging

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax.training import compilations


def test_new_shapes_are_announced_once(caplog):
  watch = compilations.Compilations(3, lambda batch: f"{batch['x'].shape[0]}")
  with caplog.at_level(logging.INFO, logger="absl"):
    found = [watch.is_new({"x": np.zeros(n)}) for n in (2, 3, 2, 3)]
  assert found == [True, True, False, False]
  assert [record.getMessage() for record in caplog.records] == [
    "compiling for 2 (1 of 3 shapes)",
    "compiling for 3 (2 of 3 shapes)",
  ]


def test_programs_beyond_the_shapes_are_reported_each_once(caplog):
  watch = compilations.Compilations(1, compilations.name_leaves)
  program = jax.jit(lambda x: x + 1)
  batch = jnp.ones(4)
  watch.is_new(batch)
  program(batch)
  watch.count(program._cache_size())
  assert not caplog.records
  program(batch.astype(jnp.int32))  # Another type, the same shape.
  for _ in range(3):
    watch.count(program._cache_size())
  (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
  assert "2 programs for 1 shapes" in record.getMessage()


def test_a_batch_is_named_by_its_arrays():
  batch = {"a": np.zeros((2, 3)), "b": np.zeros(5)}
  assert compilations.name_leaves(batch) == "2x3, 5"
