"""The engine fills models exactly, inverts itself, and names every misfit."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax import sharding, tree
from sana_jax.nn import layers, stack
from sana_jax.weights import files, mapping

DEPTH = 3


class Tiny(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.joined = layers.Linear(4, 9, rngs=rngs)
    self.part = layers.Linear(4, 2, use_bias=False, rngs=rngs)
    self.rest = layers.Linear(4, 5, use_bias=False, rngs=rngs)
    self.conv = layers.Conv(2, 3, rngs=rngs)
    self.blocks = stack.make_blocks(
      lambda key: layers.Linear(4, 6, rngs=nnx.Rngs(key)), rngs.params(), DEPTH
    )


def rules():
  sizes = {"split_sizes": (2, 7)}
  return [
    mapping.Rule(
      "joined/kernel", ("a.weight", "b.weight"), *mapping.LINEAR, **sizes
    ),
    mapping.Rule("joined/bias", ("a.bias", "b.bias"), **sizes),
    mapping.Rule("part/kernel", ("both.weight",), *mapping.LINEAR, rows=(0, 2)),
    mapping.Rule("rest/kernel", ("both.weight",), *mapping.LINEAR, rows=(2, 7)),
    mapping.Rule("conv/kernel", ("conv.weight",), *mapping.CONV),
    mapping.Rule("conv/bias", ("conv.bias",)),
    *(
      rule
      for i in range(DEPTH)
      for rule in (
        mapping.Rule(
          "blocks/kernel",
          (f"{i}.q.weight", f"{i}.k.weight"),
          *mapping.LINEAR,
          index=i,
        ),
        mapping.Rule("blocks/bias", (f"{i}.bias",), index=i),
      )
    ),
  ]


@pytest.fixture
def tensors(rng):
  shapes = {
    "a.weight": (2, 4),
    "b.weight": (7, 4),
    "a.bias": (2,),
    "b.bias": (7,),
    "both.weight": (7, 4),
    "conv.weight": (3, 2, 3, 3),
    "conv.bias": (3,),
  }
  for i in range(DEPTH):
    shapes |= {
      f"{i}.q.weight": (3, 4),
      f"{i}.k.weight": (3, 4),
      f"{i}.bias": (6,),
    }
  return {
    name: rng.normal(size=shape).astype(np.float32)
    for name, shape in shapes.items()
  }


def abstract():
  return jax.eval_shape(lambda: Tiny(nnx.Rngs(0)))


def test_tensors_are_joined_cut_transposed_and_stacked(tensors):
  model = mapping.load(abstract(), rules(), tensors)
  joined = np.concatenate([tensors["a.weight"], tensors["b.weight"]])
  np.testing.assert_array_equal(model.joined.kernel[...], joined.T)
  np.testing.assert_array_equal(
    model.rest.kernel[...], tensors["both.weight"][2:].T
  )
  np.testing.assert_array_equal(
    model.blocks.kernel[...][1, :, 3:], tensors["1.k.weight"].T
  )
  np.testing.assert_array_equal(
    model.conv.kernel[...][0, 2, 1], tensors["conv.weight"][:, 1, 0, 2]
  )


def test_the_loaded_model_computes(tensors, rng):
  model = mapping.load(abstract(), rules(), tensors)
  x = rng.normal(size=(5, 4)).astype(np.float32)
  expected = x @ tensors["both.weight"][:2].T
  # float32 rounding of a sum of four products.
  found = model.part(jnp.asarray(x))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_saving_returns_what_was_loaded(tensors):
  saved = mapping.save(mapping.load(abstract(), rules(), tensors), rules())
  assert saved.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(saved[name], tensor)
    assert saved[name].flags.c_contiguous


@pytest.mark.parametrize(
  ("transform", "shape"),
  [
    (mapping.LINEAR, (3, 5)),
    (mapping.CONV1X1, (3, 5, 1, 1)),
    (mapping.CONV, (3, 5, 3, 7)),
    (mapping.DEPTHWISE, (6, 1, 3, 5)),
  ],
)
def test_transforms_invert_each_other(transform, shape, rng):
  tensor = rng.normal(size=shape)
  np.testing.assert_array_equal(
    transform.to_torch(transform.to_jax(tensor)), tensor
  )


def test_parameters_take_the_requested_dtype(tensors):
  model = mapping.load(abstract(), rules(), tensors, dtype=jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {
    jnp.dtype(jnp.bfloat16)
  }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_every_device_gets_its_shard(tensors, dtype):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  whole = mapping.load(abstract(), rules(), tensors, dtype=dtype)

  # Stacked and plain parameters, cut on one axis, on two, and not at all.
  cuts = {
    "blocks/kernel": (None, "fsdp", "data"),
    "joined/kernel": ("fsdp",),
    "part/kernel": ("data", None),
  }
  shardings = tree.map_with_names(
    lambda name, _: NamedSharding(mesh, PartitionSpec(*cuts.get(name, ()))),
    abstract(),
  )
  found = mapping.load(
    abstract(), rules(), tensors, dtype=dtype, shardings=shardings
  )
  jax.tree.map(np.testing.assert_array_equal, found, whole)
  placed = jax.tree.map(
    lambda leaf, place: leaf.sharding == place, *(found, shardings)
  )
  assert all(jax.tree.leaves(placed))
  assert found.blocks.kernel[...].addressable_shards[0].data.shape == (3, 1, 3)


def test_blocks_may_be_spread_over_devices(tensors):
  reads = collections.Counter()

  def counted(name, tensor):
    def read():
      reads[name] += 1
      return tensor

    return files.Tensor(tensor.shape, tensor.dtype, read)

  mesh = sharding.make_mesh({"fsdp": DEPTH}, jax.devices()[:DEPTH])
  shardings = tree.map_with_names(
    lambda name, _: NamedSharding(
      mesh, PartitionSpec("fsdp" if name.startswith("blocks") else None)
    ),
    abstract(),
  )
  lazy = {name: counted(name, tensor) for name, tensor in tensors.items()}
  found = mapping.load(abstract(), rules(), lazy, shardings=shardings)
  whole = mapping.load(abstract(), rules(), tensors)
  jax.tree.map(np.testing.assert_array_equal, found, whole)
  # Two parameters are rows of one tensor.
  assert reads == dict.fromkeys(tensors, 1) | {"both.weight": 2}


def test_large_matrices_are_transposed_and_cast_as_small_ones(rng):
  source = rng.normal(size=(200, 130)).astype(np.float32)
  model = jax.eval_shape(lambda: layers.Linear(130, 200, rngs=nnx.Rngs(0)))
  rows = [
    mapping.Rule("kernel", ("w",), *mapping.LINEAR),
    mapping.Rule("bias", ("b",)),
  ]
  named = {"w": source, "b": source[:, 0]}
  found = mapping.load(model, rows, named, dtype=jnp.bfloat16)
  np.testing.assert_array_equal(
    found.kernel[...], source.T.astype(jnp.bfloat16)
  )
  np.testing.assert_array_equal(
    found.bias[...], source[:, 0].astype(jnp.bfloat16)
  )


def test_nothing_is_copied_until_a_published_tensor_is_read(tensors):
  model = mapping.load(abstract(), rules(), tensors)
  published = mapping.published(model, rules())
  assert {n: t.shape for n, t in published.items()} == {
    n: t.shape for n, t in tensors.items()
  }
  model.conv.bias[...] = jnp.arange(3.0)
  bias = mapping.published(model, rules())["conv.bias"]
  np.testing.assert_array_equal(np.asarray(bias), [0, 1, 2])


def test_all_misfits_are_listed_at_once(tensors):
  del tensors["a.bias"], tensors["2.q.weight"]
  tensors["conv.bias"] = np.zeros(4, np.float32)
  tensors["extra"] = np.zeros(1, np.float32)
  with pytest.raises(ValueError, match=r"file\.safetensors") as error:
    mapping.load(abstract(), rules(), tensors, source="file.safetensors")
  for part in (
    "missing tensor a.bias (2,)",
    "missing tensor 2.q.weight (3, 4)",
    "conv.bias has shape (4,), expected (3,)",
    "unexpected tensor extra (1,)",
  ):
    assert part in str(error.value)


def test_tensors_that_are_no_parameters_can_be_ignored(tensors):
  tensors["pos_embed"] = np.zeros((1, 4), np.float32)
  mapping.load(abstract(), rules(), tensors, ignore=("pos_.*",))
  with pytest.raises(ValueError, match="unexpected tensor pos_embed"):
    mapping.load(abstract(), rules(), tensors, ignore=("pos",))


def test_a_table_with_a_gap_is_an_error(tensors):
  incomplete = [rule for rule in rules() if rule.names != ("1.bias",)]
  with pytest.raises(ValueError, match=r"blocks/bias .* not filled exactly"):
    mapping.load(abstract(), incomplete, tensors)
  model = mapping.load(abstract(), rules(), tensors)
  with pytest.raises(ValueError, match=r"blocks/bias .* not filled exactly"):
    mapping.save(model, incomplete)


def test_a_rule_without_a_parameter_is_an_error(tensors):
  more = [*rules(), mapping.Rule("absent/bias", ("absent.bias",))]
  with pytest.raises(ValueError, match="rule for absent/bias"):
    mapping.load(abstract(), more, tensors)


def test_paths_are_the_names_of_the_tree():
  assert set(tree.leaf_names(abstract())) == {r.path for r in rules()}
