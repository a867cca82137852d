"""Images know how they were made, and requests can be made of that."""

import io
import json

import numpy as np
import PIL.Image
import pytest
from etils import epath

from sana_jax import images as images_lib
from sana_jax.bulk import metadata, plan
from sana_jax.diffusion import schedules
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(path)
  return path


@pytest.fixture(scope="module", params=["flow", "sprint"])
def pipe(request, tokenizer):
  solver = schedules.SCM() if request.param == "sprint" else None
  return tiny.make_pipeline(tokenizer, solver=solver)


def describe(pipe, settings, **values):
  image = plan.Image(9, "a cät", "", 5, 2, settings, {})._replace(**values)
  run = metadata.describe_run(
    pipe,
    epath.Path("/models/tiny"),
    {"checkpoint_sha256": "ab" * 32},
    {"dtype": "float32"},
  )
  return metadata.describe_image(pipe, image, {**run, "batch_size": 4}), run


def test_a_description_makes_the_request_again(pipe, tmp_path, rng):
  settings = {
    "height": 16,
    "guidance_scale": 3.0,
    "num_inference_steps": 4,
    "complex_human_instruction": None,
  }
  if pipe.is_sprint:
    settings["max_timesteps"] = 1.5
  else:
    settings["guidance_interval"] = (0.1, 0.9)
  description, _ = describe(pipe, settings)
  path = tmp_path / "a.png"
  image = rng.random((8, 8, 3)).astype(np.float32)
  images_lib.write_png(
    path, image, metadata=metadata.png_chunks(description, image.shape)
  )
  read = metadata.read_png(path)
  assert read == json.loads(json.dumps(description))
  request = metadata.request_again(pipe, "a.png", read)
  (again,) = plan.make_plan([request], seed=77).images()
  assert (again.prompt, again.seed, again.image_index) == ("a cät", 5, 2)
  config = pipe.generation_config
  assert config.replace(again.settings) == config.replace(settings)
  assert "use_resolution_binning" not in again.settings


def test_differences_are_named(pipe):
  description, run = describe(pipe, {})
  assert metadata.differences(description, run) == []
  changed = run | {"checkpoint_sha256": "cd" * 32, "dtype": "bfloat16"}
  first, second = metadata.differences(description, changed)
  assert "gives another model: checkpoint_sha256 was abab" in first
  assert "dtype was float32, is bfloat16" in second
  (only,) = metadata.differences(description, run | {"lora_sha256": ["ef"]})
  assert "--lora is another: lora_sha256 was None, is ['ef']" in only
  older = {k: v for k, v in description.items() if k != "jax"}
  (only,) = metadata.differences(older, run)
  assert "jax was None" in only


def png(tmp_path, **chunks):
  path = tmp_path / "a.png"
  image = np.zeros((2, 2, 3), np.float32)
  images_lib.write_png(path, image, metadata=chunks)
  return path


def test_images_that_do_not_say_enough_are_refused(tmp_path):
  with pytest.raises(ValueError, match="does not say how it was made"):
    metadata.read_png(png(tmp_path, parameters="a cat"))
  with pytest.raises(ValueError, match="does not say its batch_size, image_i"):
    metadata.read_png(png(tmp_path, sana_jax='{"prompt": "a", "seed": 1}'))
  with pytest.raises(FileNotFoundError):
    metadata.read_png(tmp_path / "nowhere.png")
  (tmp_path / "b.png").write_bytes(b"no picture")
  with pytest.raises(PIL.UnidentifiedImageError):
    metadata.read_png(tmp_path / "b.png")


@pytest.mark.parametrize("text", ["7", "[1]", '"a"', "null", "[" * 100_000])
def test_hostile_chunks_say_nothing(tmp_path, text):
  with pytest.raises(ValueError, match="does not say how it was made"):
    metadata.read_png(png(tmp_path, sana_jax=text))


def test_text_chunks_are_those_of_other_tools(pipe):
  description, _ = describe(pipe, {"guidance_scale": 3.0})
  chunks = metadata.png_chunks(description | {"negative_prompt": "x"}, (6, 8))
  first, second, third = chunks["parameters"].splitlines()
  assert (first, second) == ("a cät", "Negative prompt: x")
  assert "CFG scale: 3.0, Seed: 5, Size: 8x6, Model hash: ababababab" in third
  content = images_lib.encode_png(np.ones((6, 8, 3), np.float32), chunks)
  with PIL.Image.open(io.BytesIO(content)) as image:
    image.load()
    assert image.text == chunks
