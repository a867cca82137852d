"""Placement: every parameter has a row, and rows mean what they say."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from sana_jax import config as config_lib
from sana_jax import sharding, tree
from sana_jax.models import controlnet, dc_ae, gemma2, sana

# Matrices whose input is the width, and those whose output is.
SANA_1600M_ON_2X4 = {
  "blocks/cross_attention/kv/kernel": P(None, "fsdp"),
  "blocks/cross_attention/out/kernel": P(None, None, "fsdp"),
  "blocks/cross_attention/q/kernel": P(None, "fsdp"),
  "blocks/ffn/inverted/kernel": P(None, "fsdp"),
  "blocks/ffn/point/kernel": P(None, None, "fsdp"),
  "blocks/self_attention/out/kernel": P(None, None, "fsdp"),
  "blocks/self_attention/qkv/kernel": P(None, "fsdp"),
  "caption_embed/linear_1/kernel": P(None, "fsdp"),
  "caption_embed/linear_2/kernel": P("fsdp"),
  "head/projection/kernel": P("fsdp"),
  "patch_embed/projection/kernel": P(None, "fsdp"),
  "time_embed/linear_1/kernel": P(None, "fsdp"),
  "time_embed/linear_2/kernel": P("fsdp"),
  "time_modulation/kernel": P("fsdp"),
}


def shapes_of(cls, config):
  return jax.eval_shape(lambda: cls.from_config(config, rngs=nnx.Rngs(0)))


def one_layer_per_stage(config: config_lib.DCAEConfig) -> config_lib.DCAEConfig:
  """The rows are about names and ranks: depth only costs time."""
  return dataclasses.replace(
    config,
    encoder_layers_per_block=(1,) * 6,
    decoder_layers_per_block=(1,) * 6,
  )


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


def test_the_placement_of_sana_1600m_is_known():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  shapes = shapes_of(sana.SanaTransformer, config_lib.sana_1600m())
  placed = sharding.param_shardings(shapes, sana.PARAM_AXES, mesh)
  specs = dict(
    zip(
      tree.leaf_names(shapes),
      (place.spec for place in jax.tree.leaves(placed)),
      strict=True,
    )
  )
  assert {n: s for n, s in specs.items() if s != P()} == SANA_1600M_ON_2X4
  assert len(specs) == 31


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


def test_other_rules_give_tensor_parallelism():
  mesh = sharding.make_mesh({"data": 2, "tensor": 4})
  rules = dict.fromkeys(sharding.FSDP_RULES) | {"mlp": "tensor"}
  shapes = {"kernel": jax.ShapeDtypeStruct((6, 8), jnp.float32)}
  rows = (("kernel", ("embed", "mlp")),)
  placed = sharding.param_shardings(shapes, rows, mesh, rules)
  assert placed["kernel"].spec == P(None, "tensor")


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
    ({"data": -1, "fsdp": 1}, (8, 1)),
    ({"data": 2, "fsdp": -1}, (2, 4)),
    ({"data": 4, "fsdp": 2}, (4, 2)),
  ],
)
def test_a_mesh_takes_all_devices(axes, shape):
  assert sharding.make_mesh(axes).devices.shape == shape


@pytest.mark.parametrize(
  ("axes", "message"),
  [
    ({"data": 3, "fsdp": -1}, "does not fit 8 devices"),
    ({"data": -1, "fsdp": -1}, "at most one -1"),
    ({"data": 0, "fsdp": -1}, "does not fit 8 devices"),
    ({"data": 2, "fsdp": 2}, "uses 4 of 8 devices; set one axis to -1"),
  ],
)
def test_a_mesh_that_does_not_fit_is_an_error(axes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(axes)


def test_a_batch_is_spread_over_all_axes():
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  batch = jax.device_put(jnp.ones((16, 3)), sharding.batch_sharding(mesh))
  assert batch.addressable_shards[0].data.shape == (2, 3)


def test_placed_arrays_are_gathered_unchanged(rng):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  arrays = {"a": rng.random((8, 3), np.float32), "b": jnp.bfloat16([1, 2])}
  shardings = {"a": sharding.batch_sharding(mesh)}
  shardings["b"] = sharding.replicated(mesh)
  placed = sharding.place(arrays, shardings)
  assert placed["a"].addressable_shards[0].data.shape == (1, 3)
  assert placed["b"].dtype == jnp.bfloat16
  jax.tree.map(np.testing.assert_array_equal, sharding.gather(placed), arrays)
