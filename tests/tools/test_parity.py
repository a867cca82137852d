"""The report names the layer that differs, and no other."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from sana_jax.models import sana
from sana_jax.tools import activations, parity
from sana_jax.weights import components, files
from tests import tiny


def make_model(**options):
  config = tiny.transformer_config(num_layers=3, **options)
  model = tiny.random_model(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0)), 0
  )
  return model, config


def make_inputs(rng, *, guided=False):
  inputs = {
    "hidden_states": rng.normal(size=(2, 4, 6, 8)).astype(np.float32),
    "timestep": np.array([20.0, 700.0], np.float32),
    "encoder_hidden_states": rng.normal(size=(2, 5, 12)).astype(np.float32),
    "encoder_attention_mask": np.array([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]]),
  }
  if guided:
    inputs["guidance"] = np.array([0.45, 0.1], np.float32)
  return inputs


@pytest.mark.parametrize("guided", [False, True])
def test_the_written_out_pass_is_the_network(rng, guided):
  model, _ = make_model(guidance_embeds=guided, interpolation_scale=2.0)
  inputs = make_inputs(rng, guided=guided)
  ours = parity.run(model, inputs)
  with jax.default_matmul_precision("highest"):
    expected = jax.jit(sana.SanaTransformer.__call__)(
      model,
      inputs["hidden_states"].transpose(0, 2, 3, 1),
      inputs["timestep"],
      inputs["encoder_hidden_states"],
      inputs["encoder_attention_mask"] != 0,
      guidance=inputs.get("guidance"),
    )
  assert list(ours) == activations.names(3)
  found = ours["sample"].transpose(0, 2, 3, 1)
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def recorded(tmp_path, rng):
  """A saved model, its recording, and a function that breaks and reports."""
  model, config = make_model()
  inputs = make_inputs(rng)
  file = tmp_path / "recorded.safetensors"
  parity.record(file, inputs, parity.run(model, inputs))

  def break_and_run(name=None, *, block=None, arguments=()):
    directory = tmp_path / "transformer"
    components.save_transformer(directory, model, config)
    if name is not None:
      path = directory / "diffusion_pytorch_model.safetensors"
      opened = files.open_safetensors(path)
      tensors = {k: np.asarray(v) for k, v in opened.items()}
      full = name if block is None else f"transformer_blocks.{block}.{name}"
      # A small error: 1 % of one tensor.
      tensors[full] = tensors[full] * np.float32(1.01)
      safetensors.numpy.save_file(tensors, path, {"format": "pt"})
    command = [str(file), f"--transformer={directory}", *arguments]
    return parity.main(command)

  return break_and_run


def test_the_same_model_does_not_diverge(recorded, capsys):
  assert recorded() == 0
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[1:-1]] == activations.names(3)
  assert lines[-1] == "no layer diverges by more than 0.0001"


@pytest.mark.parametrize(
  ("name", "block", "first"),
  [
    ("patch_embed.proj.weight", None, "patch_embed"),
    ("time_embed.linear.weight", None, "time_embed.modulation"),
    (
      "time_embed.emb.timestep_embedder.linear_2.weight",
      None,
      "time_embed.embedded",
    ),
    ("caption_projection.linear_1.weight", None, "caption_projection"),
    ("caption_norm.weight", None, "caption_norm"),
    ("attn1.to_out.0.weight", 1, "block1.attn1"),
    ("attn2.to_v.weight", 2, "block2.attn2"),
    ("ff.conv_depth.weight", 0, "block0.ff"),
    ("ff.conv_point.weight", 2, "block2.ff"),
    ("scale_shift_table", None, "norm_out"),
    ("proj_out.weight", None, "proj_out"),
  ],
)
def test_the_layer_with_an_error_is_named(recorded, capsys, name, block, first):
  assert recorded(name, block=block) == 1
  lines = capsys.readouterr().out.splitlines()
  assert lines[-1].startswith(f"first to diverge: {first}, by ")
  before = activations.names(3).index(first)
  assert not any("diverges" in line for line in lines[1 : before + 1])


def test_the_tolerance_and_the_dtype_are_heeded(recorded, capsys):
  assert recorded("proj_out.weight", arguments=["--tolerance=0.1"]) == 0
  assert recorded(arguments=["--dtype=bfloat16"]) == 1
  assert recorded(arguments=["--dtype=bfloat16", "--tolerance=0.1"]) == 0


def test_a_broken_activation_diverges():
  recording = parity.Recording("", {}, {"a": np.ones((2, 3))}, {"a": 1e-3})
  (layer,) = parity.compare({"a": np.full((2, 3), np.nan)}, recording, 1e-4)
  assert layer.diverges
  # Ten floors are allowed.
  (layer,) = parity.compare({"a": np.full((2, 3), 1.005)}, recording, 1e-4)
  assert not layer.diverges
  (layer,) = parity.compare({"a": np.full((2, 3), 1.02)}, recording, 1e-4)
  assert layer.diverges


def test_recordings_that_do_not_fit_are_refused():
  outputs = {"a": np.ones((2, 3)), "block9": np.ones(2)}
  recording = parity.Recording("", {}, outputs, {})
  with pytest.raises(
    ValueError, match=r"unknown block9; a has shape \(2, 3\), here \(3, 2\)"
  ):
    parity.compare({"a": np.ones((3, 2))}, recording, 1e-4)
  with pytest.raises(ValueError, match="has no outputs"):
    parity.compare({}, parity.Recording("", {}, {}, {}), 1e-4)


def write_case(directory, runs, rng, **case):
  """A case directory whose runs share their inputs."""
  model, config = make_model()
  components.save_transformer(directory, model, config)
  inputs = make_inputs(rng)
  tensors = {f"in.{name}": value for name, value in inputs.items()}
  for run in runs:
    for name, value in parity.run(model, inputs).items():
      inter = "" if name == "sample" else "inter."
      tensors[f"out.{run}{inter}{name}"] = value
  tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  safetensors.numpy.save_file(tensors, directory / "reference.safetensors")
  files.write_json(directory / "case.json", case)


def test_a_case_directory_has_runs_and_floors(tmp_path, rng, capsys):
  floors = {"out.main.inter.block1": {"fp32_floor": 2e-6}}
  write_case(tmp_path, ["main.", "other."], rng, tensors=floors)
  assert parity.main([str(tmp_path)]) == 2
  assert "has the runs ['main', 'other']" in capsys.readouterr().err
  assert parity.main([str(tmp_path), "--run=main"]) == 0
  lines = capsys.readouterr().out.splitlines()
  assert "2.0e-06" in next(line for line in lines if line.startswith("block1 "))
  assert parity.main([str(tmp_path), "--run=third"]) == 2
  assert "no run 'third'" in capsys.readouterr().err


def test_what_is_missing_is_named(tmp_path, capsys):
  assert parity.main([str(tmp_path / "none.safetensors")]) == 2
  assert "none.safetensors does not exist" in capsys.readouterr().err
  file = tmp_path / "half.safetensors"
  safetensors.numpy.save_file({"in.timestep": np.ones(1, np.float32)}, file)
  assert parity.main([str(file), f"--transformer={tmp_path}"]) == 2
  error = capsys.readouterr().err
  assert "lacks ['in.hidden_states', 'in.encoder_hidden_states']" in error


def test_a_recording_made_here_is_compared_elsewhere(tmp_path, rng, capsys):
  model, config = make_model()
  components.save_transformer(tmp_path / "dir", model, config)
  inputs = {f"in.{name}": value for name, value in make_inputs(rng).items()}
  safetensors.numpy.save_file(inputs, tmp_path / "inputs.safetensors")
  transformer = f"--transformer={tmp_path / 'dir'}"
  out = tmp_path / "cpu.safetensors"
  assert (
    parity.main(
      [str(tmp_path / "inputs.safetensors"), transformer, f"--record={out}"]
    )
    == 0
  )
  assert capsys.readouterr().out == f"{out}\n"
  assert parity.main([str(out), transformer, "--tolerance=1e-5"]) == 0
