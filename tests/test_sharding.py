"""Placement: every parameter has a row, and rows mean what they say."""

import dataclasses
import itertools
import pathlib
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from sana_jax import config as config_lib
from sana_jax import sharding, tree
from sana_jax.models import controlnet, dc_ae, gemma2, sana
from sana_jax.nn import layers
from sana_jax.sharding import mesh as mesh_lib
from tests import placements

GOLDEN = pathlib.Path(__file__).parent / "placements.txt"


def shapes_of(cls, config):
  return jax.eval_shape(lambda: cls.from_config(config, rngs=nnx.Rngs(0)))


def one_layer_per_stage(config: config_lib.DCAEConfig) -> config_lib.DCAEConfig:
  """The rows are about names and ranks: depth only costs time."""
  return dataclasses.replace(
    config,
    encoder_layers_per_block=(1,) * 6,
    decoder_layers_per_block=(1,) * 6,
  )


SANA_1600M = config_lib.sana_1600m()


def affine_sana() -> config_lib.SanaConfig:
  config = config_lib.sana_sprint_1600m()
  config.norm_elementwise_affine = config.attention_bias = True
  return config


def batch_norm_dc_ae() -> config_lib.DCAEConfig:
  config = one_layer_per_stage(config_lib.DCAEConfig())
  return dataclasses.replace(config, decoder_norm_types="batch_norm")


PRESETS = (
  (sana.SanaTransformer, sana.PARAM_AXES, config_lib.sana_600m),
  (sana.SanaTransformer, sana.PARAM_AXES, config_lib.sana_1600m),
  (sana.SanaTransformer, sana.PARAM_AXES, config_lib.sana_1600m_4k),
  (sana.SanaTransformer, sana.PARAM_AXES, config_lib.sana15_4800m),
  (sana.SanaTransformer, sana.PARAM_AXES, config_lib.sana_sprint_1600m),
  (sana.SanaTransformer, sana.PARAM_AXES, affine_sana),
  (
    *(controlnet.SanaControlNet, controlnet.PARAM_AXES),
    config_lib.SanaControlNetConfig,
  ),
  (gemma2.Gemma2, gemma2.PARAM_AXES, config_lib.Gemma2Config),
  (dc_ae.DCAE, dc_ae.PARAM_AXES, batch_norm_dc_ae),
  pytest.param(
    *(dc_ae.DCAE, dc_ae.PARAM_AXES, config_lib.DCAEConfig),
    marks=pytest.mark.slow,
  ),
  pytest.param(
    *(dc_ae.DCAE, dc_ae.PARAM_AXES, config_lib.dc_ae_lite),
    marks=pytest.mark.slow,
  ),
)


@pytest.mark.parametrize(("cls", "rows", "preset"), PRESETS)
def test_every_large_parameter_of_a_model_is_sharded(cls, rows, preset):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  shapes = shapes_of(cls, preset())
  placed = sharding.param_shardings(shapes, rows, mesh)
  sizes = {False: 0, True: 0}
  for shape, place in zip(
    jax.tree.leaves(shapes), jax.tree.leaves(placed), strict=True
  ):
    sizes["fsdp" in place.spec] += shape.size
    place.shard_shape(shape.shape)  # raises when it does not divide
  assert sizes[False] < 0.02 * sizes[True]


@pytest.mark.parametrize(
  ("cls", "rows", "configs"),
  [
    (sana.SanaTransformer, sana.PARAM_AXES, [affine_sana()]),
    (gemma2.Gemma2, gemma2.PARAM_AXES, [config_lib.Gemma2Config()]),
    (dc_ae.DCAE, dc_ae.PARAM_AXES, [batch_norm_dc_ae()]),
  ],
)
def test_no_row_of_a_table_is_dead(cls, rows, configs):
  names = [name for c in configs for name in tree.leaf_names(shapes_of(cls, c))]
  first = {
    next(pattern for pattern, _ in rows if re.search(pattern, name))
    for name in names
  }
  assert first == {pattern for pattern, _ in rows}


@pytest.mark.parametrize(
  ("cls", "rows", "config"),
  [
    (sana.SanaTransformer, sana.PARAM_AXES, affine_sana()),
    (
      *(controlnet.SanaControlNet, controlnet.PARAM_AXES),
      config_lib.SanaControlNetConfig(),
    ),
    (gemma2.Gemma2, gemma2.PARAM_AXES, config_lib.Gemma2Config()),
    (dc_ae.DCAE, dc_ae.PARAM_AXES, batch_norm_dc_ae()),
  ],
)
def test_a_layer_gathers_its_kernel_along_the_axis_that_is_cut(
  cls, rows, config
):
  """Along another, what the table cuts would have to be moved first."""
  seen = 0
  for path, module in nnx.iter_modules(shapes_of(cls, config)):
    if isinstance(module, layers.Linear):
      name = "/".join(map(str, (*path, "kernel")))
      axes = next(axes for pattern, axes in rows if re.search(pattern, name))
      cut = [axis in ("embed", "fused_embed") for axis in axes[-2:]]
      assert module.axes.index("embed") == cut.index(True), name
      seen += 1
  assert seen > 5


def test_the_placement_of_the_published_models_is_as_reviewed():
  assert placements.table() == GOLDEN.read_text(), (
    "review the change, then: python -m tests.placements > tests/placements.txt"
  )


def test_a_width_that_does_not_divide_is_replicated():
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8})
  shapes = {"a": jax.ShapeDtypeStruct((16, 3), jnp.float32)}
  shapes["b"] = jax.ShapeDtypeStruct((12, 3), jnp.float32)
  rows = (("", ("embed", None)),)
  placed = sharding.param_shardings(shapes, rows, mesh)
  assert placed["a"].spec == P("fsdp")
  assert placed["b"].spec == P()


def test_the_first_matching_row_wins():
  mesh = sharding.make_mesh({"data": 1, "fsdp": 8})
  rows = (("kernel", (None, "embed")), ("", ("embed", None)))
  shapes = {
    n: jax.ShapeDtypeStruct((8, 8), jnp.float32) for n in ("kernel", "x")
  }
  placed = sharding.param_shardings(shapes, rows, mesh)
  assert placed["kernel"].spec == P(None, "fsdp")
  assert placed["x"].spec == P("fsdp")


def test_mesh_axes_are_kept_while_they_divide():
  mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  rows = (("", ("fused_embed", "mlp")),)
  shapes = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in (("a", (16, 3)), ("b", (12, 4)), ("c", (6, 4)))
  }
  placed = sharding.param_shardings(shapes, rows, mesh)
  assert {name: place.spec for name, place in placed.items()} == {
    "a": P(("fsdp", "tensor")),
    "b": P("fsdp", "tensor"),
    "c": P(None, "tensor"),
  }


def test_what_the_table_does_not_cover_is_an_error():
  mesh = sharding.make_mesh({"data": -1, "fsdp": 1})
  shapes = {"a": {"kernel": jax.ShapeDtypeStruct((4, 2), jnp.float32)}}
  with pytest.raises(ValueError, match=r"No sharding row .*a/kernel \(4, 2\)"):
    sharding.param_shardings(shapes, (("bias", (None,)),), mesh)
  with pytest.raises(ValueError, match=r"'kernel' has 1 axes, but a/kernel"):
    sharding.param_shardings(shapes, (("kernel", (None,)),), mesh)
  with pytest.raises(ValueError, match="No sharding rule .*'tokens'"):
    sharding.param_shardings(shapes, (("", (None, "tokens")),), mesh)


@pytest.mark.parametrize(
  ("axes", "shape"),
  [
    ({"data": -1, "fsdp": 1}, (8, 1, 1, 1)),
    ({"fsdp": -1, "data": 2}, (2, 4, 1, 1)),
    ({"sequence": 4, "data": 2}, (2, 1, 1, 4)),
    ({"data": -1, "fsdp": 2, "tensor": 2, "sequence": 2}, (1, 2, 2, 2)),
  ],
)
def test_a_mesh_takes_all_devices(axes, shape):
  mesh = sharding.make_mesh(axes)
  assert mesh.devices.shape == shape
  assert mesh.axis_names == ("data", "fsdp", "tensor", "sequence")


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    ({"data": 3, "fsdp": -1}, "does not fit 8 devices"),
    ({"data": -1, "fsdp": -1}, "at most one -1"),
    ({"data": 0, "fsdp": -1}, "does not fit 8 devices"),
    ({"data": 2, "fsdp": 2}, "uses 4 of 8 devices; set one axis to -1"),
    ({"data": 2, "model": 4}, r"unknown mesh axes \['model'\]; there are"),
  ],
)
def test_a_mesh_that_does_not_fit_is_an_error(axes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(axes)


class Chip(NamedTuple):
  """What `mesh_utils` asks of a TPU chip."""

  id: int
  slice_index: int
  coords: tuple[int, int, int]
  process_index: int = 0
  core_on_chip: int = 0
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"


def chips(slices: int) -> list[Chip]:
  """The chips of slices of 4 x 4."""
  corners = itertools.product(range(slices), range(4), range(4))
  return [Chip(i, s, (x, y, 0)) for i, (s, y, x) in enumerate(corners)]


def test_the_data_axis_spans_slices_and_no_other_does():
  found = mesh_lib.arrange((4, 2, 1, 4), as_array(chips(2)))
  slices = np.vectorize(lambda chip: chip.slice_index)(found)
  assert (slices[:2] == 0).all()
  assert (slices[2:] == 1).all()
  assert len(set(found.flat)) == 32


def test_neighbours_in_the_mesh_are_neighbours_in_the_slice():
  found = mesh_lib.arrange((1, 4, 1, 4), as_array(chips(1)))
  for row in found[0, :, 0]:
    for one, other in itertools.pairwise(row):
      steps = np.abs(np.subtract(one.coords, other.coords))
      # 3: around the edge of the torus.
      assert steps.sum() in (1, 3)
      assert np.count_nonzero(steps) == 1


@pytest.mark.parametrize(
  ("shape", "taken", "message"),
  [
    ((1, 8, 1, 4), 32, "data=1 is not a multiple of the 2 slices.*set data to"),
    ((3, 8, 1, 1), 24, "2 slices of 8 and 16 chips"),
  ],
)
def test_slices_that_the_data_axis_cannot_span_are_an_error(
  shape, taken, message
):
  with pytest.raises(ValueError, match=message):
    mesh_lib.arrange(shape, as_array(chips(2)[:taken]))


def as_array(items):
  """NumPy would make more axes of tuples."""
  array = np.empty(len(items), object)
  array[:] = items
  return array


def abstract_mesh(**sizes):
  return AbstractMesh(
    tuple(sizes.get(axis, 1) for axis in sharding.AXES), sharding.AXES
  )


def test_a_mesh_axis_that_cuts_next_to_nothing_is_an_error():
  shapes = {"transformer": shapes_of(sana.SanaTransformer, SANA_1600M)}
  rows = {"transformer": sana.PARAM_AXES}

  def check(**sizes):
    sharding.check_every_axis_cuts(shapes, rows, abstract_mesh(**sizes))

  check(data=512)
  check(data=2, fsdp=64, sequence=2)
  check(fsdp=32, tensor=2)
  with pytest.raises(
    ValueError,
    match=r"fsdp=128 cuts 0% .*embed of 2240, such as in transformer/\S+k.*"
    r"all of these: 1, 2, .* 64, 70.*set data=2, fsdp=64 ",
  ):
    check(fsdp=128)
  with pytest.raises(ValueError, match=r"set data=6, fsdp=64 .*HSDP"):
    check(data=3, fsdp=128)
  with pytest.raises(
    ValueError,
    match=r"tensor=3 cuts .*heads of 2240, such as in transformer/blocks.*mlp "
    r"of 5600.*these: 1, 2, 4, 5, .*set tensor=1, and data=3",
  ):
    check(fsdp=4, tensor=3)


def test_a_batch_is_spread_over_data_and_fsdp():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  batch = jax.device_put(jnp.ones((16, 3)), sharding.batch_sharding(mesh))
  assert batch.addressable_shards[0].data.shape == (4, 3)


def test_a_constraint_does_nothing_without_a_mesh(rng):
  x = jnp.asarray(rng.random((3, 5), np.float32))
  assert sharding.constrain(x, ("batch", "rows")) is x
  assert sharding.shards("batch") == 1


def test_a_constraint_shards_what_a_mesh_in_use_traces(rng):
  mesh = sharding.make_mesh({"fsdp": 2, "sequence": 4})
  x = rng.random((4, 8, 3)).astype(np.float32)

  @jax.jit
  def double(x):
    with sharding.use(mesh):
      assert sharding.shards("batch") == 2
      return sharding.constrain(2 * x, ("batch", "rows", None))

  doubled = double(jax.device_put(x, sharding.replicated(mesh)))
  assert doubled.addressable_shards[0].data.shape == (2, 2, 3)
  np.testing.assert_array_equal(doubled, 2 * x)


def test_a_constraint_does_nothing_where_arrays_are_local(rng):
  mesh = sharding.make_mesh({"data": 8})
  x = rng.random((8, 5)).astype(np.float32)
  local = jax.shard_map(
    lambda x: sharding.constrain(2 * x, ("batch", None)),
    mesh=mesh,
    in_specs=P("data"),
    out_specs=P("data"),
  )
  np.testing.assert_array_equal(jax.jit(local)(x), 2 * x)


def test_a_constraint_that_does_not_divide_is_an_error():
  mesh = sharding.make_mesh({"data": 2, "sequence": 4})
  x = jax.ShapeDtypeStruct((4, 6), jnp.float32)

  def constrain(x):
    with sharding.use(mesh):
      return sharding.constrain(x, ("batch", "rows"))

  with pytest.raises(
    ValueError,
    match=r"rows axis of \(4, 6\), 6, is not .*=4. Sizes .* it: 1, 2, 3, 6.",
  ):
    jax.eval_shape(constrain, x)


def test_placed_arrays_are_gathered_unchanged(rng):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  arrays = {"a": rng.random((8, 3), np.float32), "b": jnp.bfloat16([1, 2])}
  shardings = {"a": sharding.batch_sharding(mesh)}
  shardings["b"] = sharding.replicated(mesh)
  placed = sharding.place(arrays, shardings)
  assert placed["a"].addressable_shards[0].data.shape == (1, 3)
  assert placed["b"].dtype == jnp.bfloat16
  jax.tree.map(np.testing.assert_array_equal, sharding.gather(placed), arrays)
