"""Components are recognised by layout, prefix and shape, and saved again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.models import sana
from sana_jax.weights import (
  architecture,
  components,
  files,
  mapping,
  opening,
  orbax_files,
)
from sana_jax.weights import sana as sana_weights
from tests import tiny


def assert_same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def config():
  return tiny.transformer_config(guidance_embeds=True)


@pytest.fixture(scope="module")
def model(config):
  return tiny.random_model(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0)), 0
  )


@pytest.fixture(scope="module")
def original(config, model):
  """The tensors of an original file, with the extra ones it carries."""
  tensors = mapping.save(model, sana_weights.original_rules(config))
  return tensors | {
    "pos_embed": np.zeros((1, 64, 16), np.float32),
    "y_embedder.y_embedding": np.zeros((300, 12), np.float32),
  }


def write(path, tensors):
  path.write_bytes(safetensors.numpy.save(tensors))


def test_a_saved_transformer_is_loaded_with_its_config(tmp_path, config, model):
  components.save_transformer(tmp_path, model, config)
  found, found_config = components.load_transformer(tmp_path)
  assert found_config == config
  assert_same(found, model)


def test_parameters_may_be_wider_than_the_computation(tmp_path, config, model):
  components.save_transformer(tmp_path, model, config)
  found, _ = components.load_transformer(
    tmp_path, dtype=jnp.bfloat16, param_dtype=jnp.float32
  )
  assert_same(jax.tree.leaves(found), jax.tree.leaves(model))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_original_files_are_recognised(
  tmp_path, config, model, original, prefix
):
  path = tmp_path / "original.safetensors"
  write(path, {prefix + name: value for name, value in original.items()})
  found, _ = components.load_transformer(path, config=config)
  assert_same(found, model)


def test_a_config_beside_a_file_is_read(tmp_path, config, model, original):
  write(tmp_path / "original.safetensors", original)
  values = {"_class_name": "SanaTransformer2DModel", **config.to_dict()}
  files.write_json(tmp_path / "config.json", values)
  found, found_config = components.load_transformer(
    tmp_path / "original.safetensors"
  )
  assert found_config == config
  assert_same(found, model)


def test_unknown_architectures_need_a_config(tmp_path, config, model, original):
  write(tmp_path / "original.safetensors", original)
  with pytest.raises(ValueError, match="width 16.*pass config="):
    components.load_transformer(tmp_path / "original.safetensors")
  tensors = mapping.save(model, sana_weights.diffusers_rules(config))
  write(tmp_path / "bare.safetensors", tensors)
  with pytest.raises(ValueError, match="says nothing of its architecture"):
    components.load_transformer(tmp_path / "bare.safetensors")


@pytest.mark.parametrize(
  ("preset", "grid"),
  [
    (config_lib.sana_600m, 32),
    (config_lib.sana_1600m_4k, 128),
    (config_lib.sana15_4800m, 32),
    (config_lib.sana_sprint_600m, 32),
  ],
)
def test_published_architectures_are_told_by_their_shapes(preset, grid):
  config = preset()
  rules = sana_weights.original_rules(config)
  abstract = jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0))
  )
  shapes = mapping.expected_shapes(abstract, rules)
  shapes["pos_embed"] = (1, grid**2, config.width)
  tensors = {
    name: files.Tensor(shape, np.dtype(np.float32), lambda: np.empty(0))
    for name, shape in shapes.items()
  }
  assert architecture.infer_transformer_config(tensors) == config


def test_autoencoders_are_saved_and_loaded(tmp_path, rng):
  config = tiny.autoencoder_config()
  model = tiny.random_model(
    lambda: components.dc_ae.DCAE.from_config(config, rngs=nnx.Rngs(0)), 1
  )
  components.save_autoencoder(tmp_path, model, config)
  found, found_config = components.load_autoencoder(tmp_path)
  assert found_config == config
  assert_same(found, model)
  tensors = {"encoder.stages.0.x": np.ones(1, np.float32)}
  write(tmp_path / "other.safetensors", tensors)
  (tmp_path / "config.json").unlink()
  with pytest.raises(ValueError, match="unexpected tensor encoder.stages.0.x"):
    components.load_autoencoder(tmp_path / "other.safetensors")


def test_text_encoders_are_saved_and_loaded(tmp_path):
  config = tiny.text_encoder_config(64)
  model = tiny.random_model(
    lambda: components.gemma2.Gemma2.from_config(config, rngs=nnx.Rngs(0)), 2
  )
  components.save_text_encoder(tmp_path, model, config)
  found, found_config = components.load_text_encoder(tmp_path)
  assert found_config == config
  assert_same(found, model)
  assert (tmp_path / "model.safetensors").exists()
  file = tmp_path / "model.safetensors"
  tensors = {f"model.{k}": np.asarray(v) for k, v in open_all(file).items()}
  write(file, tensors | {"lm_head.weight": np.zeros((64, 12), np.float32)})
  assert_same(components.load_text_encoder(tmp_path)[0], model)


def open_all(path):
  return {k: np.asarray(v) for k, v in files.open_safetensors(path).items()}


def test_missing_and_strange_files_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
    components.load_transformer(tmp_path / "nowhere")
  (tmp_path / "x.ckpt").write_text("")
  with pytest.raises(ValueError, match=r"suffix '\.ckpt'; expected"):
    components.load_transformer(tmp_path / "x.ckpt")


def test_integers_of_the_text_encoder_are_written_as_integers(tmp_path):
  config = tiny.text_encoder_config(64)
  assert isinstance(config.query_pre_attn_scalar, float)
  found = opening.config_json(config)["query_pre_attn_scalar"]
  assert isinstance(found, int)
  config.query_pre_attn_scalar = 7.5
  assert opening.config_json(config)["query_pre_attn_scalar"] == 7.5


def test_there_are_only_layouts_that_exist(tmp_path):
  config = tiny.text_encoder_config(64)
  component = opening.component(config, {})
  with pytest.raises(ValueError, match="no layout 'original' of a text_enc"):
    opening.rules_of(component, "original")


def test_an_unfinished_orbax_item_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="no complete Orbax checkpoint"):
    orbax_files.open_tree(tmp_path)
