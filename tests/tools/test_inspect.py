"""A report says what a path holds, from headers alone, and what is wrong."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

import sana_jax
from sana_jax import checkpoint
from sana_jax import config as config_lib
from sana_jax.models import sana
from sana_jax.tools import convert, inspect, recognition
from sana_jax.training import step as step_lib
from sana_jax.weights import components, files, mapping, opening
from sana_jax.weights import sana as sana_weights
from tests import tiny


def make_transformer(config):
  return tiny.random_model(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0)), 0
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A tiny transformer's directory, tensors and config."""
  path = tmp_path_factory.mktemp("saved")
  config = tiny.transformer_config()
  model = make_transformer(config)
  components.save_transformer(path, model, config)
  return path, mapping.save(model, sana_weights.diffusers_rules(config)), config


@pytest.mark.parametrize("name", recognition.PRESETS)
def test_published_architectures_are_named(name):
  config = recognition.PRESETS[name]()
  assert recognition.architecture(config) == name
  values = json.loads(json.dumps(opening.config_json(config)))
  again = config_lib.from_dict(type(config), values)
  assert recognition.architecture(again) == name


def test_an_architecture_does_not_depend_on_the_size_of_images():
  small = config_lib.sana_600m()
  small.sample_size = 16
  assert recognition.architecture(small) == "sana_600m"
  listed = config_lib.Gemma2Config()
  listed.layer_types = ("sliding_attention", "full_attention") * 13
  assert recognition.architecture(listed) == "gemma_2_2b"
  listed.layer_types = ("full_attention",) * 26
  assert recognition.architecture(listed) is None
  other = config_lib.sana_1600m_2k()
  other.sample_size = 32
  assert recognition.architecture(other) is None


def test_a_component_is_counted_and_checked(saved):
  path, tensors, config = saved
  report = recognition.describe(path)
  assert report["kind"] == "transformer"
  assert report["layout"] == "diffusers"
  assert report["architecture"] is None
  assert report["config"]["num_layers"] == config.num_layers
  count = sum(tensor.size for tensor in tensors.values())
  assert report["parameters"] == count
  assert report["bytes"] == 4 * count
  assert report["dtypes"] == {
    "float32": {"tensors": len(tensors), "bytes": 4 * count}
  }
  assert report["problems"] == report["variants"] == []


def test_variants_are_listed_and_chosen(saved, tmp_path):
  path, tensors, config = saved
  files.write_component(tmp_path, opening.config_json(config), tensors)
  half = {name: value.astype(np.float16) for name, value in tensors.items()}
  safetensors.numpy.save_file(
    half, tmp_path / "diffusion_pytorch_model.fp16.safetensors"
  )
  assert recognition.describe(tmp_path)["variants"] == ["fp16"]
  assert list(recognition.describe(tmp_path)["dtypes"]) == ["float32"]
  chosen = recognition.describe(tmp_path, variant="fp16")
  assert list(chosen["dtypes"]) == ["float16"]


def test_missing_unexpected_and_misshapen_tensors_fail_the_command(
  saved, tmp_path, capsys
):
  _, tensors, config = saved
  broken = dict(tensors)
  del broken["proj_out.bias"]
  broken["extra"] = tensors["proj_out.bias"]
  broken["caption_norm.weight"] = np.ones(7, np.float32)
  files.write_component(tmp_path, opening.config_json(config), broken)
  assert inspect.main([str(tmp_path)]) == 1
  out = capsys.readouterr().out
  assert "  missing tensor proj_out.bias (4,)" in out
  assert "  unexpected tensor extra (4,)" in out
  assert "  caption_norm.weight has shape (7,), expected (16,)" in out


@pytest.mark.parity
def test_original_files_tell_step_and_average(saved, tmp_path):
  torch = pytest.importorskip("torch")
  _, tensors, config = saved
  model = make_transformer(config)
  original = mapping.save(model, sana_weights.original_rules(config))
  state = {name: torch.tensor(value) for name, value in original.items()}
  state["y_embedder.y_embedding"] = torch.zeros(3, 12)
  torch.save(
    {"state_dict": state, "state_dict_ema": state, "epoch": 3, "step": 700},
    tmp_path / "sana.pth",
  )
  files.write_json(tmp_path / "config.json", opening.config_json(config))
  report = recognition.describe(tmp_path / "sana.pth")
  assert (report["ema"], report["epoch"], report["step"]) == (True, 3, 700)
  assert report["layout"] == "original"
  assert report["ignored"] == ["y_embedder.y_embedding"]
  count = sum(tensor.size for tensor in tensors.values())
  assert report["parameters"] == count
  torch.save(state, tmp_path / "bare.pth")
  assert recognition.describe(tmp_path / "bare.pth")["ema"] is False


def test_converted_components_are_described(saved, tmp_path):
  path, tensors, _ = saved
  convert.convert(path, tmp_path / "orbax", to="orbax")
  report = recognition.describe(tmp_path / "orbax")
  assert report["layout"] == "orbax"
  assert report["parameters"] == sum(value.size for value in tensors.values())
  assert report["problems"] == []


def test_a_pipeline_is_described_with_its_solver_and_licence(tmp_path):
  report = recognition.describe(sana_jax.bundled_checkpoint())
  assert report["kind"] == "pipeline"
  assert report["class"] == "SanaPipeline"
  assert report["solver"] == {
    "name": "FlowDPMSolver",
    "flow_shift": 5.0,
    "solver_order": 2,
  }
  assert list(report["components"]) == ["text_encoder", "transformer", "vae"]
  assert recognition.problems(report) == []
  assert report["parameters"] == 9_164_227
  with pytest.raises(FileNotFoundError, match="weights of variant 'fp16'"):
    recognition.describe(sana_jax.bundled_checkpoint(), variant="fp16")


def test_problems_of_a_pipeline_name_the_component(tmp_path):
  tiny.make_tokenizer(tmp_path)
  pipe = tiny.make_pipeline(tmp_path)
  path = tmp_path / "pipe"
  pipe.save_pretrained(path)
  config = path / "transformer" / "config.json"
  values = files.read_json(config)
  files.write_json(config, values | {"num_layers": 1})
  for file in (path / "vae").iterdir():
    file.unlink()
  (path / "vae").rmdir()
  found = recognition.problems(recognition.describe(path))
  assert found[0] == "missing directory vae"
  assert all(
    problem.startswith("transformer: unexpected tensor transformer_blocks.1.")
    for problem in found[1:]
  )


def test_the_licence_is_that_of_the_model_card(saved, tmp_path):
  _, tensors, config = saved
  files.write_component(tmp_path, opening.config_json(config), tensors)
  card = tmp_path / "README.md"
  card.write_text("---\nlicense: other\nlicense_name: nvidia\n---\n# Sana\n")
  assert recognition.describe(tmp_path)["licence"] == "nvidia"
  card.write_text("# No header\nlicense: mit\n")
  assert "licence" not in recognition.describe(tmp_path)


def test_a_training_run_is_described(tmp_path):
  config = config_lib.TextToImageConfig(
    model=tiny.transformer_config(),
    text_encoder=tiny.text_encoder_config(64),
  )
  (tmp_path / "config.json").write_text(config.to_json())
  (tmp_path / "checkpoints").mkdir()
  assert recognition.problems(recognition.describe(tmp_path)) == [
    "no checkpoint"
  ]
  params = {"transformer": make_transformer(config.model)}
  moments = jax.tree.map(jnp.ones_like, params)
  state = step_lib.TrainState(
    jnp.int32(7), params, params, (moments,), jnp.int32(0)
  )

  def save(step, state):
    checkpointer = checkpoint.Checkpointer(
      tmp_path, config_lib.CheckpointConfig()
    )
    checkpointer.save(step, state)
    checkpointer.wait()
    checkpointer.close()

  save(7, state)
  report = recognition.describe(tmp_path)
  assert (report["kind"], report["trains"]) == ("training run", "text to image")
  assert (report["step"], report["steps"], report["ema"]) == (7, [7], True)
  assert report["flow_shift"] == config.flow.shift
  part = report["components"]["transformer"]
  assert part["layout"] == "orbax"
  assert part["problems"] == []
  assert report["optimizer_bytes"] == part["bytes"]
  save(8, state._replace(step=jnp.int32(8), ema=None))
  report = recognition.describe(tmp_path)
  assert (report["step"], report["ema"]) == (8, False)
  assert report["components"]["transformer"]["problems"] == []
  config.model.num_layers = 3
  (tmp_path / "config.json").write_text(config.to_json())
  found = recognition.problems(recognition.describe(tmp_path))
  shape = "blocks/ffn/depth_bias has shape (2, 80), expected (3, 80)"
  assert f"transformer: {shape}" in found


def write_lora(path, tensors, **metadata):
  safetensors.numpy.save_file(tensors, path, metadata)


def test_a_lora_file_is_described(tmp_path, rng):
  module = "transformer.transformer_blocks.{}.attn1.to_out.0.lora_{}.weight"
  tensors = {
    module.format(i, side): rng.normal(size=shape).astype(np.float32)
    for i in range(2)
    for side, shape in (("A", (4, 16)), ("B", (16, 4)))
  }
  path = tmp_path / "pytorch_lora_weights.safetensors"
  write_lora(
    path,
    tensors,
    lora_adapter_metadata=json.dumps(
      {"transformer.r": 4, "transformer.lora_alpha": 8}
    ),
  )
  report = recognition.describe(tmp_path)
  assert report["kind"] == "lora"
  assert report["ranks"] == [4]
  assert report["alphas"] == [8]
  assert report["targets"] == ["attn1.to_out.0"]
  assert report["blocks"] == 2
  assert report["problems"] == []
  del tensors[module.format(1, "A")]
  tensors[module.format(0, "B")] = np.ones((16, 3), np.float32)
  tensors["transformer.bias"] = np.ones(3, np.float32)
  write_lora(path, tensors)
  report = recognition.describe(path)
  (problem,) = report["problems"]
  for part in ("transformer_blocks.1.attn1.to_out.0", "transformer.bias"):
    assert part in problem


def test_gigabytes_take_a_moment(tmp_path):
  """A sparse file of SANA 1.6B in float32: 6.4 GB of zeros, none of it read."""
  config = config_lib.sana_1600m()
  abstract = jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0))
  )
  shapes = mapping.expected_shapes(
    abstract, sana_weights.diffusers_rules(config)
  )
  header, end = {}, 0
  for name, shape in shapes.items():
    begin, end = end, end + 4 * int(np.prod(shape))
    header[name] = {
      "dtype": "F32",
      "shape": shape,
      "data_offsets": [begin, end],
    }
  text = json.dumps(header).encode()
  path = tmp_path / "diffusion_pytorch_model.safetensors"
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    file.truncate(8 + len(text) + end)
  files.write_json(tmp_path / "config.json", opening.config_json(config))
  start = time.perf_counter()
  report = recognition.describe(tmp_path)
  # A second on an idle machine; reading would take longer than this.
  assert time.perf_counter() - start < 20
  assert report["architecture"] == "sana_1600m"
  assert report["parameters"] == 1_604_462_752
  assert report["problems"] == []


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path, capsys):
  assert inspect.main([str(tmp_path / "nowhere")]) == 2
  assert "nowhere does not exist" in capsys.readouterr().err
  safetensors.numpy.save_file(
    {"lm.weight": np.ones(3, np.float32)}, tmp_path / "other.safetensors"
  )
  with pytest.raises(ValueError, match="neither a SANA transformer, nor"):
    recognition.describe(tmp_path / "other.safetensors")
  files.write_json(tmp_path / "config.json", {"_class_name": "UNet"})
  with pytest.raises(ValueError, match="describes a UNet; expected a Sana"):
    recognition.describe(tmp_path / "other.safetensors")


def test_the_command_prints_json(saved, capsys):
  assert inspect.main([str(saved[0]), "--json"]) == 0
  report = json.loads(capsys.readouterr().out)
  assert report == json.loads(json.dumps(recognition.describe(saved[0])))
