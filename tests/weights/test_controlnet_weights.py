import dataclasses
import gzip
import inspect
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.models import controlnet as controlnet_lib
from sana_jax.models import sana
from sana_jax.weights import architecture, components, files, mapping
from sana_jax.weights import controlnet as controlnet_weights
from sana_jax.weights import sana as sana_weights
from tests import tiny

REFKIT = os.environ.get("SANA_JAX_REFKIT")
FIELDS = {f.name for f in dataclasses.fields(config_lib.SanaControlNetConfig)}


def _config(of=None, **changes):
  values = (of or tiny.transformer_config(num_layers=2)).to_dict()
  values = {name: value for name, value in values.items() if name in FIELDS}
  return config_lib.SanaControlNetConfig(**values | changes)


def _abstract(config):
  return jax.eval_shape(
    lambda: controlnet_lib.SanaControlNet.from_config(config, rngs=nnx.Rngs(0))
  )


def _model(config):
  return tiny.random_model(
    lambda: controlnet_lib.SanaControlNet.from_config(config, rngs=nnx.Rngs(0)),
    0,
  )


def _assert_same(found, expected):
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def _original_file(path, branch, config):
  """Writes a branch and its transformer as published; returns the latter."""
  transformer_config = tiny.transformer_config(num_layers=4, qk_norm=None)
  transformer = tiny.random_model(
    lambda: sana.SanaTransformer.from_config(
      transformer_config, rngs=nnx.Rngs(0)
    ),
    1,
  )
  tensors = mapping.save(
    transformer, sana_weights.original_rules(transformer_config)
  )
  tensors |= mapping.save(branch, controlnet_weights.original_rules(config))
  tensors["pos_embed"] = np.zeros((1, 64, 16), np.float32)
  tensors["y_embedder.y_embedding"] = np.zeros((300, 12), np.float32)
  path.write_bytes(safetensors.numpy.save(tensors))
  return transformer_config, transformer


def test_a_saved_branch_is_loaded_with_its_config(tmp_path):
  config = _config(patch_size=2)
  model = _model(config)
  components.save_controlnet(tmp_path, model, config)
  found, found_config = components.load_controlnet(tmp_path)
  assert found_config == config
  _assert_same(found, model)
  written = json.loads((tmp_path / "config.json").read_text())
  assert written.keys() == {"_class_name"} | FIELDS


def test_original_files_hold_a_branch_and_its_transformer(tmp_path):
  config = _config()
  branch = _model(config)
  path = tmp_path / "model.safetensors"
  transformer_config, transformer = _original_file(path, branch, config)
  found, _ = components.load_controlnet(path, config=config)
  _assert_same(found, branch)
  found, _ = components.load_transformer(path, config=transformer_config)
  # The embeddings are one set of tensors in the file: the branch's.
  _assert_same(found.blocks, transformer.blocks)
  _assert_same(found.head, transformer.head)
  _assert_same(found.patch_embed, branch.patch_embed)


def test_only_the_config_of_a_branch_beside_a_file_is_taken(tmp_path):
  config = _config()
  path = tmp_path / "model.safetensors"
  transformer_config, _ = _original_file(path, _model(config), config)
  name = tmp_path / "config.json"
  values = {"_class_name": "SanaTransformer2DModel"}
  name.write_text(json.dumps(values | transformer_config.to_dict()))
  with pytest.raises(ValueError, match=r"width 16, expected one of \[1152"):
    components.load_controlnet(path)
  values = {"_class_name": "SanaControlNetModel"}
  name.write_text(json.dumps(values | config.to_dict()))
  assert components.load_controlnet(path)[1] == config


def test_a_file_without_a_config_is_an_error(tmp_path):
  config = _config()
  tensors = mapping.save(
    _model(config), controlnet_weights.diffusers_rules(config)
  )
  path = tmp_path / "model.safetensors"
  path.write_bytes(safetensors.numpy.save(tensors))
  with pytest.raises(ValueError, match="says nothing of its architecture"):
    components.load_controlnet(path)


@pytest.mark.parametrize(
  "preset", [config_lib.sana_600m, config_lib.sana_1600m]
)
def test_published_sizes_are_recognised(preset):
  config = _config(preset(), num_layers=7)
  shapes = mapping.expected_shapes(
    _abstract(config), controlnet_weights.original_rules(config)
  )
  tensors = {
    name: files.Tensor(shape, np.dtype(np.float32), lambda: None)
    for name, shape in shapes.items()
  }
  assert architecture.infer_controlnet_config(tensors) == config


@pytest.mark.parity
@pytest.mark.skipif(REFKIT is None, reason="SANA_JAX_REFKIT is not set")
@pytest.mark.parametrize(
  ("name", "preset"),
  [("600M", config_lib.sana_600m), ("1600M", config_lib.sana_1600m)],
)
def test_names_and_shapes_are_the_published_ones(name, preset):
  def manifest(kind):
    file = f"Sana_{name}_1024px_ControlNet.{kind}.json.gz"
    path = next(pathlib.Path(REFKIT).rglob(file))
    return json.loads(gzip.decompress(path.read_bytes()))

  config = _config(preset(), num_layers=7)
  rules = {
    "diffusers": controlnet_weights.diffusers_rules(config),
    "original": controlnet_weights.original_rules(config),
  }
  for kind, table in rules.items():
    shapes = mapping.expected_shapes(_abstract(config), table)
    expected = {k: tuple(shape) for k, shape in manifest(kind).items()}
    assert shapes == expected
  by_parameter = {
    (rule.path, rule.index): rule.names for rule in rules["diffusers"]
  }
  key_map = {
    rule.names[0]: list(by_parameter[rule.path, rule.index])
    for rule in rules["original"]
  }
  assert key_map == manifest("key_map")


@pytest.mark.parity
def test_diffusers_reads_what_is_saved(tmp_path, rng):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  config = _config(patch_size=2, norm_elementwise_affine=True)
  model = _model(config)
  components.save_controlnet(tmp_path, model, config)
  theirs = diffusers.SanaControlNetModel.from_pretrained(tmp_path)
  parameters = inspect.signature(diffusers.SanaControlNetModel).parameters
  assert parameters.keys() - {"dropout"} == FIELDS
  latents, control = (
    rng.normal(size=(2, 4, 6, 4)).astype(np.float32) for _ in range(2)
  )
  text = rng.normal(size=(2, 5, 12)).astype(np.float32)
  timestep = np.array([7.0, 900.0], np.float32)
  mask = np.array([[1] * 5, [1] * 3 + [0] * 2])
  with torch.no_grad():
    expected = theirs(
      torch.from_numpy(latents).permute(0, 3, 1, 2),
      encoder_hidden_states=torch.from_numpy(text),
      timestep=torch.from_numpy(timestep),
      controlnet_cond=torch.from_numpy(control).permute(0, 3, 1, 2),
      encoder_attention_mask=torch.from_numpy(mask),
      conditioning_scale=1.0,
    ).controlnet_block_samples
  with jax.default_matmul_precision("highest"):
    found = jax.jit(lambda model, *inputs: model(*inputs))(
      model, latents, control, timestep, text, jnp.asarray(mask, bool)
    )
  for ours, tokens in zip(found, expected, strict=True):
    tokens = tokens.numpy()
    error = np.linalg.norm(ours.reshape(tokens.shape) - tokens)
    # float32 on both sides.
    assert error < 1e-4 * np.linalg.norm(tokens)
