"""A run on noise needs no file, and leaves neither pictures nor an export."""

import jax
import numpy as np
import pytest

from sana_jax import config as config_lib
from sana_jax.data import loader
from sana_jax.training import inputs, loop, text_to_image
from tests import tiny


def make_config(**changes) -> config_lib.TextToImageConfig:
  values = {
    "model": tiny.transformer_config(),
    "text_encoder": tiny.text_encoder_config(300),
    "max_sequence_length": tiny.LENGTH,
    "data": config_lib.DataConfig(synthetic=True, image_size=32),
    "batch_size": 8,
    "num_steps": 3,
    "sample_every": 1,
    "dtype": "float32",
  }
  return config_lib.TextToImageConfig(**values | changes)


def shapes(arrays):
  return jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), arrays)


def test_noise_has_the_shapes_that_are_compiled_for_it():
  config = make_config()
  noise = inputs.from_synthetic(config)
  batch = next(iter(noise.batches(loader.Host(), 0)))
  assert shapes(batch) == shapes(inputs.abstract_batch(config, 8, 8))
  assert shapes(noise.frozen) == shapes(inputs.abstract_frozen(config))
  assert noise.size_of(batch) == (32, 32)


@pytest.mark.slow
def test_a_run_on_noise_trains_and_leaves_a_checkpoint_only(tmp_path):
  config = make_config()
  state = loop.train(config, tmp_path, text_to_image.make_recipe(config))
  assert int(state.step) == 3
  assert (tmp_path / "checkpoints" / "3").is_dir()
  assert not (tmp_path / "export").exists()
  assert not list(tmp_path.glob("samples/*"))


def test_noise_of_another_size_than_the_model_is_refused():
  config = make_config()
  config.data.image_size = 30
  with pytest.raises(
    ValueError, match=r"image_size \(30\) .*sample_size \(8\)"
  ):
    inputs.from_synthetic(config)
  config = config_lib.TextToImageConfig(
    data=config_lib.DataConfig(synthetic=True, image_size=512)
  )
  with pytest.raises(ValueError, match=r"\(512\).*\(32\).* it is 1024"):
    inputs.from_synthetic(config)


def test_a_text_encoder_is_not_trained_on_noise():
  with pytest.raises(ValueError, match="data.synthetic holds text states"):
    make_config(train_text_encoder=True).freeze()
