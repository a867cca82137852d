"""A pipeline comes out the same, whatever kind of checkpoint it is in."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from sana_jax import checkpoint as checkpoint_lib
from sana_jax import config as config_lib
from sana_jax import pipeline as pipeline_lib
from sana_jax.diffusion import schedules
from sana_jax.training import step as step_lib
from sana_jax.weights import mapping
from sana_jax.weights import sana as sana_weights
from tests import tiny

from_pretrained = pipeline_lib.SanaPipeline.from_pretrained


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
  tokenizer = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(tokenizer)
  return tiny.make_pipeline(tokenizer)


@pytest.fixture(scope="module")
def saved(flow, tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint")
  flow.save_pretrained(path)
  return path


def assert_same(found, expected):
  # Of the leaves only: dtype and clamp may differ.
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.tree.leaves(found),
    jax.tree.leaves(expected),
  )


def test_models_are_on_all_devices_from_the_start(saved, flow):
  pipe = from_pretrained(saved)
  for model in (pipe.transformer, pipe.text_encoder, pipe.autoencoder):
    for leaf in jax.tree.leaves(model):
      assert leaf.sharding.is_fully_replicated
      assert leaf.sharding.device_set == set(jax.devices())
  assert_same(pipe.transformer, flow.transformer)
  # Placing them again copies nothing.
  again = dataclasses.replace(pipe)
  kernel, other = (
    p.transformer.head.projection.kernel[...].addressable_shards[3].data
    for p in (pipe, again)
  )
  assert kernel.unsafe_buffer_pointer() == other.unsafe_buffer_pointer()


@pytest.mark.parametrize("layout", ["file", "directory"])
def test_a_transformer_alone_takes_the_rest_from_components(
  saved, flow, tmp_path, layout
):
  path = tmp_path / "transformer"
  if layout == "file":
    path.mkdir()
    rules = sana_weights.original_rules(flow.transformer_config)
    tensors = mapping.save(flow.transformer, rules)
    shutil.copy(saved / "transformer" / "config.json", path)
    path = path / "Sana_600M_1024px_MultiLing.safetensors"
    path.write_bytes(safetensors.numpy.save(tensors))
  else:
    shutil.copytree(saved / "transformer", path)
  pipe = from_pretrained(path, components=saved)
  assert_same(pipe.transformer, flow.transformer)
  assert_same(pipe.autoencoder, flow.autoencoder)
  shift = 4.0 if layout == "file" else flow.solver.flow_shift
  assert pipe.solver == schedules.FlowDPMSolver(flow_shift=shift)
  assert pipe.generation_config == flow.generation_config
  # The file's name tells that it was trained in float16.
  assert pipe.transformer.fp16_clamp == (layout == "file")
  assert not from_pretrained(
    path, components=saved, fp16_clamp=False
  ).transformer.fp16_clamp


def test_a_transformer_alone_needs_components(saved, tmp_path):
  with pytest.raises(ValueError, match="transformer only; pass components="):
    from_pretrained(saved / "transformer")
  with pytest.raises(FileNotFoundError, match="components=.* has no model_ind"):
    from_pretrained(saved / "transformer", components=tmp_path)
  with pytest.raises(FileNotFoundError, match="weights of variant 'fp16'"):
    from_pretrained(saved / "transformer", components=saved, variant="fp16")


def test_arguments_without_use_are_refused(saved, run):
  with pytest.raises(ValueError, match="components= is for.*step= is for work"):
    from_pretrained(saved, components=saved, step=3)
  with pytest.raises(ValueError, match="variant= is for published"):
    from_pretrained(run, variant="fp16")


def test_published_settings_hold_where_a_directory_has_none(saved, tmp_path):
  path = shutil.copytree(saved, tmp_path / "Sana_1600M_1024px_diffusers")
  assert from_pretrained(path).generation_config.num_inference_steps == 3
  (path / "generation_config.json").unlink()
  pipe = from_pretrained(path)
  expected = pipeline_lib.GenerationConfig(pag_applied_layers=(8,))
  assert pipe.generation_config == expected
  assert pipe.transformer.fp16_clamp


@pytest.fixture(scope="module")
def run(saved, flow, tmp_path_factory):
  """A work directory with the states of two steps."""
  workdir = tmp_path_factory.mktemp("run")
  config = config_lib.TextToImageConfig(
    model=flow.transformer_config,
    text_encoder=flow.text_encoder_config,
    train_text_encoder=True,
    autoencoder=str(saved / "vae"),
    tokenizer=str(saved / "tokenizer"),
    max_sequence_length=tiny.LENGTH,
    sample_prompts=("a cat",),
    sample_steps=7,
  )
  config.flow.shift = 2.5
  (workdir / "config.json").write_text(config.to_json())
  ema = {"transformer": flow.transformer, "text_encoder": flow.text_encoder}
  save_states(workdir, ema, (10, 20))
  return workdir


def save_states(workdir, ema, steps):
  """Saves averages that are a multiple, the step's number, of `ema`."""
  checkpointer = checkpoint_lib.Checkpointer(
    workdir, config_lib.CheckpointConfig()
  )
  for step in steps:
    scaled = jax.tree.map(lambda w: w * step, ema)  # noqa: B023
    params = jax.tree.map(lambda w: w + 1, ema)
    state = step_lib.TrainState(
      jnp.int32(step), params, scaled, params, jnp.int32(0)
    )
    checkpointer.save(step, state, {})
  checkpointer.wait()
  checkpointer.close()


@pytest.mark.parametrize(("step", "factor"), [(None, 20), (10, 10)])
def test_a_run_is_loaded_with_its_averaged_parameters(run, flow, step, factor):
  pipe = from_pretrained(run, step=step)
  for found, made in (
    (pipe.transformer, flow.transformer),
    (pipe.text_encoder, flow.text_encoder),
  ):
    assert_same(found, jax.tree.map(lambda w: w * factor, made))
  assert_same(pipe.autoencoder, flow.autoencoder)
  assert pipe.solver == schedules.FlowDPMSolver(flow_shift=2.5)
  assert pipe.generation_config.num_inference_steps == 7
  assert not pipe.transformer.fp16_clamp
  leaf = pipe.transformer.head.projection.kernel[...]
  assert leaf.sharding.device_set == set(jax.devices())


def test_a_run_may_be_loaded_in_bfloat16_and_makes_images(run, flow):
  pipe = from_pretrained(
    run, step=10, dtype=jnp.bfloat16, devices=jax.devices()[:1]
  )
  expected = jax.tree.map(
    lambda w: (w * 10).astype(jnp.bfloat16), flow.transformer
  )
  assert_same(pipe.transformer, expected)
  assert pipe("a cat", num_inference_steps=1).images.std() > 0


def test_components_may_replace_what_a_run_names(run, saved, tmp_path, flow):
  values = json.loads((run / "config.json").read_text())
  values |= {
    "autoencoder": "nowhere/vae",
    "train_text_encoder": False,
    "text_encoder_path": "nowhere/text_encoder",
  }
  (tmp_path / "config.json").write_text(json.dumps(values))
  save_states(tmp_path, {"transformer": flow.transformer}, (1,))
  with pytest.raises(
    FileNotFoundError, match="needs nowhere/vae, nowhere/text_enc.*components="
  ):
    from_pretrained(tmp_path)
  pipe = from_pretrained(tmp_path, components=saved)
  assert_same(pipe.autoencoder, flow.autoencoder)
  assert_same(pipe.text_encoder, flow.text_encoder)


def test_absent_steps_and_other_runs_are_named(run, tmp_path):
  with pytest.raises(FileNotFoundError, match=r"step 15, only of \[10, 20\]"):
    from_pretrained(run, step=15)
  other = shutil.copytree(run, tmp_path / "other")
  values = json.loads((other / "config.json").read_text())
  changed = values | {"model": values["model"] | {"num_layers": 3}}
  (other / "config.json").write_text(json.dumps(changed))
  with pytest.raises(ValueError, match="checkpoint 20 does not fit this conf"):
    from_pretrained(other)
  (other / "config.json").write_text(config_lib.AutoencoderConfig().to_json())
  with pytest.raises(ValueError, match="not that of a text-to-image run"):
    from_pretrained(other)
  shutil.rmtree(other / "checkpoints")
  (other / "checkpoints").mkdir()
  (other / "config.json").write_text(json.dumps(values))
  with pytest.raises(FileNotFoundError, match="holds no checkpoint yet"):
    from_pretrained(other)
