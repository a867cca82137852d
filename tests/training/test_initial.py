"""A run begins with exactly what a checkpoint of any kind holds."""

import dataclasses
import logging

import jax
import numpy as np
import pytest

from configs import emoji
from sana_jax import config as config_lib
from sana_jax import sharding, text
from sana_jax.tools import convert
from sana_jax.training import initial, loop, program, text_to_image
from sana_jax.weights import components
from tests import tiny

BUNDLED = "sana_jax/assets/emoji_model"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A whole checkpoint in the layout of diffusers."""
  path = tmp_path_factory.mktemp("checkpoint")
  tiny.make_tokenizer(path / "made")
  tiny.make_pipeline(path / "made").save_pretrained(path / "pipeline")
  return path / "pipeline"


def make_config(init_from, **changes) -> config_lib.TextToImageConfig:
  values = {
    "model": tiny.transformer_config(),
    "text_encoder": tiny.text_encoder_config(300),
    "init_from": str(init_from),
    "max_sequence_length": tiny.LENGTH,
    "data": config_lib.DataConfig(synthetic=True, image_size=32),
    "mesh": {"data": 2, "fsdp": 4},
    "batch_size": 8,
    "num_steps": 2,
    "dtype": "float32",
  }
  return config_lib.TextToImageConfig(**values | changes)


def abstract_params(config):
  recipe = text_to_image.make_recipe(
    dataclasses.replace(config, train_text_encoder=False)
  )
  return program.make_program(
    config,
    init=lambda key: text_to_image.init_params(config, key),
    param_axes=recipe.param_axes,
    loss_fn=recipe.loss_fn,
    mesh=sharding.make_mesh(config.mesh),
  ).state.params


def load(config):
  return initial.prepare(config, abstract_params(config))()


def assert_equal(found, expected):
  jax.tree.map(
    np.testing.assert_array_equal,
    jax.tree.leaves(found),
    jax.tree.leaves(expected),
  )


def test_parameters_come_to_their_places_as_they_are_in_the_file(checkpoint):
  config = make_config(checkpoint)
  abstract = abstract_params(config)
  params = initial.prepare(config, abstract)()
  assert jax.tree.structure(params) == jax.tree.structure(abstract)
  for leaf, wanted in zip(
    jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True
  ):
    assert (leaf.dtype, leaf.sharding) == (wanted.dtype, wanted.sharding)
  expected, _ = components.load_transformer(checkpoint / "transformer")
  assert_equal(params["transformer"], expected)


@pytest.mark.parametrize("layout", ["original", "orbax"])
def test_every_layout_is_read(checkpoint, tmp_path, layout):
  convert.convert(checkpoint, tmp_path / "whole", to=layout)
  expected = load(make_config(checkpoint))
  assert_equal(load(make_config(tmp_path / "whole")), expected)
  alone = tmp_path / "whole" / "transformer"
  assert_equal(load(make_config(alone)), expected)
  if layout == "original":
    assert_equal(load(make_config(alone / "model.safetensors")), expected)


def test_a_trained_text_encoder_is_read_too(checkpoint):
  tokenizer = text.Tokenizer.from_pretrained(checkpoint / "tokenizer")
  config = make_config(
    checkpoint,
    train_text_encoder=True,
    text_encoder=tiny.text_encoder_config(tokenizer.vocab_size),
  )
  expected, _ = components.load_text_encoder(checkpoint / "text_encoder")
  assert_equal(load(config)["text_encoder"], expected)
  with pytest.raises(FileNotFoundError, match="is a transformer alone"):
    load(
      dataclasses.replace(config, init_from=f"{config.init_from}/transformer")
    )


@pytest.mark.long
def test_the_model_that_ships_is_fine_tuned(tmp_path):
  config = emoji.get_config()
  config.init_from = BUNDLED
  config.train_text_encoder = False
  config.data = config_lib.DataConfig(synthetic=True)
  config.optim.warmup_steps = 0
  config.optim.schedule = "constant"
  # Of the cosine.
  config.optim.final_lr_ratio = 0.0
  config.optim.peak_lr = 1e-5
  config.optim.weight_decay = 0.0
  config.num_steps, config.batch_size = 2, 8
  config.ema_decay = 0.5
  state = loop.train(config, tmp_path, text_to_image.make_recipe(config))
  expected, _ = components.load_transformer(f"{BUNDLED}/transformer")
  for found in (state.params, state.ema):
    moved = [
      np.abs(np.asarray(a) - np.asarray(b)).max()
      for a, b in zip(
        jax.tree.leaves(found["transformer"]),
        jax.tree.leaves(expected),
        strict=True,
      )
    ]
    # Each of two steps of Adam moves a parameter by the learning rate at most
    # (the second by a little more); a random model would be far away.
    assert 0 < max(moved) < 2.5e-5


@pytest.mark.slow
def test_a_run_goes_on_from_the_average_of_another(
  checkpoint, tmp_path, caplog
):
  caplog.set_level(logging.INFO, logger="absl")
  first = make_config(checkpoint, ema_decay=0.9)
  first.optim.warmup_steps = 0
  state = loop.train(first, tmp_path, text_to_image.make_recipe(first))
  model = tiny.transformer_config(sample_size=4, interpolation_scale=2.0)
  second = make_config(tmp_path, model=model, mesh={"data": 8, "fsdp": 1})
  params = load(second)
  assert_equal(params["transformer"], state.ema["transformer"])
  average, last = jax.tree.leaves(params), jax.tree.leaves(state.params)
  assert not np.array_equal(average[0], last[0])
  assert "with the average of step 2 of 2 of the run in" in caplog.text
  assert "not finished" not in caplog.text
  assert_equal(load(make_config(tmp_path / "checkpoints" / "2")), params)
  longer = dataclasses.replace(first, num_steps=5)
  (tmp_path / "config.json").write_text(longer.to_json())
  abstract = abstract_params(second)
  initial.prepare(second, abstract)
  assert "not finished: what follows is taken from step 2 of 5" in caplog.text
  caplog.clear()
  named = dataclasses.replace(second, init_from=f"{tmp_path}/checkpoints/2")
  initial.prepare(named, abstract)
  assert "average of step 2 of 5" in caplog.text
  assert "not finished" not in caplog.text
  with pytest.raises(FileNotFoundError, match=r"of step 7, only of \[2\]"):
    load(make_config(tmp_path / "checkpoints" / "7"))
  model = tiny.transformer_config(num_layers=1, mlp_ratio=2.0)
  with pytest.raises(
    ValueError, match=r"layers \(2 there, 1 in .*mlp_ratio \(2.5 there, 2.0 in"
  ):
    load(make_config(tmp_path, model=model))
  other = make_config(tmp_path, train_text_encoder=True)
  with pytest.raises(ValueError, match="encoder=False, this run True: name"):
    load(other)


def test_another_architecture_is_told_field_by_field(checkpoint):
  model = tiny.transformer_config(num_layers=3, qk_norm=None)
  with pytest.raises(
    ValueError,
    match=r"model.num_layers \(2 there, 3 in the config\), model.qk_norm \(rms",
  ):
    load(make_config(checkpoint, model=model))


def test_a_clamp_that_does_not_fit_the_weights_is_warned_of(checkpoint, caplog):
  params = load(make_config(checkpoint))
  assert not params["transformer"].fp16_clamp
  assert "fp16_clamp" not in caplog.text
  params = load(make_config(checkpoint, fp16_clamp=True))
  assert params["transformer"].fp16_clamp
  assert (
    "key norms): no clamping, but this run has fp16_clamp=True" in caplog.text
  )


def test_what_is_not_there_is_said(tmp_path):
  with pytest.raises(FileNotFoundError, match="does not exist; expected a dir"):
    load(make_config(tmp_path / "nothing"))
