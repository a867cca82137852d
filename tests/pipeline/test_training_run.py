"""What a run does not train is found where its config names it."""

import pytest

from sana_jax import config as config_lib
from sana_jax.pipeline import training_run
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint")
  tiny.make_tokenizer(path / "made")
  tiny.make_pipeline(path / "made").save_pretrained(path / "whole")
  return path / "whole"


def located(checkpoint, **changes) -> config_lib.TextToImageConfig:
  return training_run.located(
    config_lib.TextToImageConfig(components=str(checkpoint), **changes)
  )


def test_what_is_left_out_comes_from_the_checkpoint(checkpoint):
  config = located(checkpoint, tokenizer="mine")
  assert config.autoencoder == str(checkpoint / "vae")
  assert config.text_encoder_path == str(checkpoint / "text_encoder")
  assert config.tokenizer == "mine"
  assert located(checkpoint, train_text_encoder=True).text_encoder_path is None


def test_a_config_that_names_all_needs_no_checkpoint(tmp_path):
  names = {name: "x" for name in ("autoencoder", "tokenizer")}
  config = located(tmp_path / "nowhere", text_encoder_path="x", **names)
  assert config.autoencoder == "x"


def test_a_checkpoint_that_lacks_something_is_refused(checkpoint, tmp_path):
  with pytest.raises(FileNotFoundError, match="does not exist; expected a dir"):
    located(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="must have a model_index.json and vae/"):
    located(checkpoint / "transformer")
  index = (checkpoint / "model_index.json").read_text()
  (tmp_path / "model_index.json").write_text(index)
  (tmp_path / "vae").mkdir()
  with pytest.raises(
    FileNotFoundError, match=r"lacks .*tokenizer, .*text_encoder; set tokenizer"
  ):
    located(tmp_path)
