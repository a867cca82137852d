import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.models import sana
from sana_jax.weights import mapping
from sana_jax.weights import sana as sana_weights

WIDTH = 16
EVERY_OPTION = {
  "patch_size": 2,
  "attention_bias": True,
  "norm_elementwise_affine": True,
  "qk_norm": "rms_norm_across_heads",
  "guidance_embeds": True,
}


def _config(**options):
  return config_lib.SanaConfig(
    in_channels=3,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=4,
    cross_attention_head_dim=4,
    cross_attention_dim=WIDTH,
    caption_channels=5,
    **options,
  )


def _abstract(config):
  return jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0))
  )


def _model(config, rng):
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
    _abstract(config),
  )


@pytest.mark.parametrize("options", [{}, EVERY_OPTION])
@pytest.mark.parametrize(
  "rules", [sana_weights.diffusers_rules, sana_weights.original_rules]
)
def test_a_saved_model_loads_unchanged(rng, options, rules):
  config = _config(**options)
  model = _model(config, rng)
  tensors = mapping.save(model, rules(config))
  loaded = mapping.load(_abstract(config), rules(config), tensors)
  jax.tree.map(np.testing.assert_array_equal, loaded, model)


def test_the_original_layout_concatenates_that_of_diffusers(rng):
  config = _config(qk_norm="rms_norm_across_heads")
  model = _model(config, rng)
  old = mapping.save(model, sana_weights.original_rules(config))
  new = mapping.save(model, sana_weights.diffusers_rules(config))
  attn = "transformer_blocks.1.attn"
  np.testing.assert_array_equal(
    old["blocks.1.attn.qkv.weight"],
    np.concatenate([new[f"{attn}1.to_{x}.weight"] for x in "qkv"]),
  )
  for kind in ("weight", "bias"):
    np.testing.assert_array_equal(
      old[f"blocks.1.cross_attn.kv_linear.{kind}"],
      np.concatenate([new[f"{attn}2.to_{x}.{kind}"] for x in "kv"]),
    )
  total = lambda tensors: sum(t.size for t in tensors.values())  # noqa: E731
  assert total(old) == total(new)


def test_tensors_have_the_published_layout(rng):
  config = _config(patch_size=2, out_channels=6)
  model = _model(config, rng)
  tensors = mapping.save(model, sana_weights.diffusers_rules(config))
  block = "transformer_blocks.0"
  shapes = {
    "patch_embed.proj.weight": (WIDTH, 3, 2, 2),
    "proj_out.weight": (2 * 2 * 6, WIDTH),
    "scale_shift_table": (2, WIDTH),
    "time_embed.linear.weight": (6 * WIDTH, WIDTH),
    "time_embed.emb.timestep_embedder.linear_1.weight": (WIDTH, 256),
    "caption_projection.linear_1.weight": (WIDTH, 5),
    f"{block}.scale_shift_table": (6, WIDTH),
    f"{block}.ff.conv_inverted.weight": (80, WIDTH, 1, 1),
    f"{block}.ff.conv_depth.weight": (80, 1, 3, 3),
    f"{block}.ff.conv_point.weight": (WIDTH, 40, 1, 1),
  }
  assert {name: tensors[name].shape for name in shapes} == shapes
  # The patch at row 1, column 0 of channel 2.
  kernel = model.patch_embed.projection.kernel[...].reshape(2, 2, 3, WIDTH)
  np.testing.assert_array_equal(
    tensors["patch_embed.proj.weight"][:, 2, 1, 0], kernel[1, 0, 2]
  )


def test_guided_models_name_their_time_embedding_differently():
  names = {
    name
    for rule in sana_weights.diffusers_rules(_config(guidance_embeds=True))
    for name in rule.names
  }
  assert "time_embed.timestep_embedder.linear_1.weight" in names
  assert "time_embed.guidance_embedder.linear_2.bias" in names
  assert not any(".emb." in name for name in names)


@pytest.mark.parametrize(
  ("config", "diffusers", "original"),
  [
    (config_lib.sana_600m(), 548, 436),
    (config_lib.sana_1600m(), 396, 316),
    (config_lib.sana15_4800m(), 1396, 1156),
    (config_lib.sana_sprint_600m(), 664, 552),
  ],
)
def test_presets_have_the_published_number_of_tensors(
  config, diffusers, original
):
  for rules, count in (
    (sana_weights.diffusers_rules(config), diffusers),
    (sana_weights.original_rules(config), original),
  ):
    assert len({name for rule in rules for name in rule.names}) == count


def test_extra_tensors_of_original_files_are_ignored_by_name_only(rng):
  config = _config()
  rules = sana_weights.original_rules(config)
  tensors = mapping.save(_model(config, rng), rules)
  extras = {
    name: np.ones((1, 2), np.float32)
    for name in (
      "pos_embed",
      "y_embedder.y_embedding",
      "logvar_linear.weight",
      "logvar_linear.bias",
    )
  }
  ignored = sana_weights.ORIGINAL_IGNORED
  assert all(any(re.fullmatch(r, name) for r in ignored) for name in extras)
  mapping.load(_abstract(config), rules, tensors | extras, ignore=ignored)
  extras["y_embedder.more"] = np.ones((1,), np.float32)
  with pytest.raises(ValueError, match="unexpected tensor y_embedder.more"):
    mapping.load(_abstract(config), rules, tensors | extras, ignore=ignored)
