"""Tensors of one layout are computed from those of another."""

import jax
import numpy as np
import pytest

from sana_jax.weights import mapping, translation

OURS = {"top": (4, 3), "bottom": (2, 3), "blocks/kernel": (2, 3, 5)}
ONE = (
  mapping.Rule("top", ("whole",), rows=(0, 4)),
  mapping.Rule("bottom", ("whole",), rows=(4, 6)),
  mapping.Rule("blocks/kernel", ("b.0",), *mapping.LINEAR, index=0),
  mapping.Rule("blocks/kernel", ("b.1",), *mapping.LINEAR, index=1),
)


@pytest.fixture
def abstract():
  nested = {
    "top": OURS["top"],
    "bottom": OURS["bottom"],
    "blocks": {"kernel": OURS["blocks/kernel"]},
  }
  return jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
    nested,
    is_leaf=lambda x: isinstance(x, tuple),
  )


@pytest.fixture
def tensors(rng):
  shapes = {"whole": (6, 3), "b.0": (5, 3), "b.1": (5, 3)}
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def read(found):
  return {name: np.asarray(tensor) for name, tensor in found.items()}


def test_rows_and_stacks_go_both_ways(abstract, tensors):
  own = mapping.own_rules(abstract)
  ours = translation.translate(abstract, tensors, ONE, own)
  assert {name: tensor.shape for name, tensor in ours.items()} == OURS
  values = read(ours)
  np.testing.assert_array_equal(values["bottom"], tensors["whole"][4:])
  np.testing.assert_array_equal(values["blocks/kernel"][1], tensors["b.1"].T)
  again = read(translation.translate(abstract, ours, own, ONE))
  assert set(again) == set(tensors)
  for name, value in tensors.items():
    np.testing.assert_array_equal(again[name], value)


def test_a_parameter_is_read_once_for_all_tensors_made_of_it(abstract, tensors):
  own = mapping.own_rules(abstract)
  ours = read(translation.translate(abstract, tensors, ONE, own))
  reads = []

  class Counted:
    def __init__(self, name):
      self.name = name
      self.shape, self.dtype = ours[name].shape, ours[name].dtype

    def __array__(self, dtype=None, copy=None):
      reads.append(self.name)
      return ours[self.name]

  counted = {name: Counted(name) for name in ours}
  found = translation.translate(abstract, counted, own, ONE)
  assert reads == []
  read(found)
  assert sorted(reads) == sorted(OURS)


def test_misfits_are_listed(abstract, tensors):
  del tensors["b.1"]
  tensors["more"] = tensors["b.0"]
  with pytest.raises(
    ValueError, match=r"(?s)file does not fit.*missing tensor b.1.*more"
  ):
    translation.translate(
      abstract, tensors, ONE, mapping.own_rules(abstract), source_name="file"
    )
