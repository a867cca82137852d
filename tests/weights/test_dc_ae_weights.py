import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.models import dc_ae
from sana_jax.weights import dc_ae as dc_ae_weights
from sana_jax.weights import mapping

LAYOUTS = [dc_ae_weights.diffusers_rules, dc_ae_weights.original_rules]


def _config(**options):
  values = {
    "latent_channels": 4,
    "attention_head_dim": 4,
    "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "decoder_block_types": ("ResBlock", "EfficientViTBlock"),
    "encoder_block_out_channels": (4, 8),
    "decoder_block_out_channels": (4, 8),
    "encoder_layers_per_block": (1, 1),
    "decoder_layers_per_block": (1, 1),
    "encoder_qkv_multiscales": ((), (5,)),
    "decoder_qkv_multiscales": ((), (3, 5)),
  }
  return config_lib.DCAEConfig(**values | options)


OTHER = {
  "encoder_layers_per_block": (0, 1),
  "decoder_layers_per_block": (0, 1),
  "decoder_norm_types": "batch_norm",
  "downsample_block_type": "pixel_unshuffle",
  "upsample_block_type": "pixel_shuffle",
  "encoder_out_shortcut": False,
  "decoder_in_shortcut": False,
}


def _abstract(config):
  return jax.eval_shape(
    lambda: dc_ae.DCAE.from_config(config, rngs=nnx.Rngs(0))
  )


def _model(config, rng):
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
    _abstract(config),
  )


@pytest.mark.parametrize("options", [{}, OTHER])
@pytest.mark.parametrize("rules", LAYOUTS)
def test_a_saved_model_loads_unchanged(rng, options, rules):
  config = _config(**options)
  model = _model(config, rng)
  tensors = mapping.save(model, rules(config))
  loaded = mapping.load(_abstract(config), rules(config), tensors)
  jax.tree.map(np.testing.assert_array_equal, loaded, model)


def test_both_layouts_hold_the_same_numbers(rng):
  config = _config()
  model = _model(config, rng)
  new, old = (mapping.save(model, rules(config)) for rules in LAYOUTS)
  block = "encoder.down_blocks.1.0.attn"
  main = "encoder.stages.1.op_list.0.context_module.main"
  qkv = [new[f"{block}.to_{part}.weight"] for part in "qkv"]
  np.testing.assert_array_equal(
    np.concatenate(qkv), old[f"{main}.qkv.conv.weight"][..., 0, 0]
  )
  np.testing.assert_array_equal(
    new[f"{block}.to_qkv_multiscale.0.proj_out.weight"],
    old[f"{main}.aggreg.0.1.weight"],
  )


def test_grouped_kernels_turn_from_rows_of_outputs_to_input_by_output(rng):
  config = _config()
  model = _model(config, rng)
  tensors = mapping.save(model, dc_ae_weights.diffusers_rules(config))
  attention = "encoder.down_blocks.1.0.attn"
  weight = tensors[f"{attention}.to_qkv_multiscale.0.proj_out.weight"]
  branch = model.encoder.stages[1].blocks[0].attention.branches[0]
  kernel = np.asarray(branch.point_kernel[...])
  assert weight.shape == (24, 4, 1, 1)
  for group, out in np.ndindex(6, 4):
    np.testing.assert_array_equal(
      weight[4 * group + out, :, 0, 0], kernel[group, :, out]
    )


def test_names_of_the_original_show_what_is_wrapped():
  plain, other = (
    {
      name
      for rule in dc_ae_weights.original_rules(config)
      for name in rule.names
    }
    for config in (_config(), _config(**OTHER))
  )
  assert "encoder.stages.0.op_list.1.main.conv.weight" in plain
  assert "decoder.stages.0.op_list.0.main.conv.conv.weight" in plain
  assert "encoder.project_out.main.op_list.0.conv.weight" in plain
  assert "decoder.project_in.main.conv.weight" in plain
  assert "encoder.project_in.conv.conv.weight" in other
  assert "decoder.project_out.op_list.2.conv.conv.weight" in other
  assert "encoder.project_out.op_list.0.conv.weight" in other
  assert "decoder.project_in.conv.weight" in other


def test_batch_counters_are_ignored(rng):
  config = _config(**OTHER)
  model = _model(config, rng)
  rules = dc_ae_weights.diffusers_rules(config)
  tensors = mapping.save(model, rules)
  name = "decoder.up_blocks.1.0.attn.norm_out.num_batches_tracked"
  tensors[name] = np.zeros((), np.int64)
  with pytest.raises(ValueError, match=re.escape(f"unexpected tensor {name}")):
    mapping.load(_abstract(config), rules, tensors)
  mapping.load(_abstract(config), rules, tensors, ignore=dc_ae_weights.IGNORED)
