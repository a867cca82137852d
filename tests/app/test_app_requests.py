"""What is admitted, and what is said about the rest."""

import json
import math
import unicodedata

import numpy as np
import PIL.Image
import pytest

from sana_jax.app import requests, solvers
from sana_jax.app.errors import InvalidRequestError
from sana_jax.app.limits import Limits
from sana_jax.diffusion import schedules
from tests import tiny

LIMITS = Limits()
NESTED: list = []
for _ in range(100_000):
  NESTED = [NESTED]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(path)
  return path


@pytest.fixture(scope="module")
def pipe(tokenizer):
  return tiny.make_pipeline(tokenizer)  # 32x32, multiples of 4


def check(pipe, loras=(), **fields):
  request = requests.from_mapping({"prompt": "a cat"} | fields)
  return requests.check(request, pipe, LIMITS, loras)


def test_what_is_left_open_is_filled_in_and_passes_again(pipe):
  checked = check(pipe)
  assert (checked.height, checked.width) == (32, 32)
  assert checked.num_inference_steps == 3
  assert checked.guidance_scale == 4.5
  assert checked.solver == "FlowDPMSolver"
  assert requests.check(checked, pipe, LIMITS) == checked
  settings = json.loads(json.dumps(checked.settings()))
  assert requests.from_mapping(settings) == checked


def test_a_character_that_is_newer_than_python_is_a_prompt(pipe):
  assert unicodedata.category("\U0001fbff") == "Cn"
  assert check(pipe, prompt="\U0001fbff").prompt == "\U0001fbff"


def test_an_aspect_becomes_a_size(pipe):
  checked = check(pipe, aspect="2:1")
  assert checked.aspect is None
  assert checked.width == pytest.approx(2 * checked.height, rel=0.15)
  assert requests.check(checked, pipe, LIMITS) == checked


def test_a_picture_gives_the_size_and_waits_at_that_size(pipe, rng):
  pixels = rng.integers(0, 255, (100, 220, 3), np.uint8)
  image = PIL.Image.fromarray(pixels)
  mask = PIL.Image.new("RGB", image.size, "white")
  checked = check(pipe, image=image, mask_image=mask, strength=0.5)
  assert checked.width > 1.5 * checked.height
  assert checked.image.size == (checked.width, checked.height)
  assert checked.mask_image.size == checked.image.size
  again = requests.check(checked, pipe, LIMITS)
  np.testing.assert_array_equal(again.image, checked.image)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
  ("field", "value", "hint"),
  [
    ("prompt", "", "empty"),
    ("prompt", " \n", "empty"),
    ("prompt", "\u200b\u2060 ", "empty"),
    ("prompt", "cat\u202etac", r"U\+202E at position 3"),
    ("prompt", 5, "text"),
    ("prompt", ["a"], "text"),
    ("prompt", "a" * 2001, "2000"),
    ("prompt", "a\x00b", r"U\+0000 at position 1"),
    ("prompt", "a\x1b[31m", r"U\+001B"),
    ("prompt", "\x85", r"U\+0085"),
    ("prompt", "\ud800", r"U\+D800"),
    ("negative_prompt", "\x07", r"U\+0007"),
    ("negative_prompt", None, "text"),
    ("num_images", 0, "from 1 to 4"),
    ("num_images", 10**6, "from 1 to 4"),
    ("num_images", 10**4000, "more than 20 digits"),
    ("num_images", 1.0, "whole"),
    ("num_images", True, "got true[.]"),
    ("num_images", None, "got null[.]"),
    ("image_index", -1, "from 0"),
    ("seed", -1, "from 0 to 4294967295"),
    ("seed", 2**32, "from 0"),
    ("seed", "7", "whole number, got '7'"),
    ("seed", {"a": [True, None]}, r'got {"a": \[true, null\]}[.]'),
    ("seed", object(), "got a value of type object"),
    ("seed", {"a": 10**5000}, "got a value of type dict"),
    ("seed", NESTED, "nested deeply"),
    ("num_inference_steps", 0, "from 1 to 100"),
    ("num_inference_steps", 101, "from 1 to 100"),
    ("num_inference_steps", -(10**400), "20 digits"),
    ("guidance_scale", math.nan, "nan"),
    ("guidance_scale", math.inf, "inf"),
    ("guidance_scale", -1.0, "from 0 to 100"),
    ("guidance_scale", 10**400, "20 digits"),
    ("guidance_scale", "4", "number"),
    ("pag_scale", -0.1, "from 0"),
    ("height", 33, "33 must be a positive multiple of 4, such as 32 or 36"),
    ("width", 33, "33 must be a positive multiple of 4, such as 32 or 36"),
    ("height", -32, "from 1"),
    ("height", 32.0, "whole"),
    ("width", 10**6, "from 1"),
    ("height", 64, "pixels"),  # with a width of 64
    ("height", 4, "4 times"),  # with a width of 64
    ("aspect", "16/9", "16:9"),
    ("aspect", "0:9", "16:9"),
    ("aspect", "9:1", "4 times"),
    ("aspect", "9" * 28 + ":1", "pixels|times"),
    ("aspect", "9" * 400 + ":1", "16:9"),
    ("aspect", 1.5, "16:9"),
    ("solver", "Magic", "FlowDPMSolver"),
    ("solver", [], "FlowDPMSolver"),
    ("solver", "\ud800", r"got '\\ud800'[.]"),
    ("strength", 0.5, "no image"),
    ("lora", "style", "no adapters here"),
    ("lora_scale", 1.0, "without lora"),
    ("image", "/etc/passwd", "picture"),
    ("image", {"path": "/etc/passwd"}, "picture"),
    ("control_image", PIL.Image.new("RGB", (32, 32)), "no ControlNet"),
    ("path", "/etc/passwd", "Unknown field"),
    ("controlnet", "x", "Unknown field"),
    ("latents", [1.0], "Unknown field"),
  ],
)
def test_what_cannot_be_is_said_with_its_field(pipe, field, value, hint):
  fields = {field: value}
  if field == "height" and value in (4, 64):
    fields["width"] = 64
  with pytest.raises(InvalidRequestError, match=hint) as caught:
    check(pipe, **fields)
  assert caught.value.field == field
  assert len(str(caught.value)) < 600


def test_a_controlnet_needs_a_picture(tokenizer):
  steered = tiny.make_pipeline(tokenizer, controlnet=True)
  with pytest.raises(InvalidRequestError, match="is missing") as caught:
    check(steered)
  assert caught.value.field == "control_image"
  picture = PIL.Image.new("RGB", (32, 32))
  assert check(steered, control_image=picture).control_image.size == (32, 32)


def test_line_breaks_and_other_scripts_are_no_control_characters(pipe):
  text = "Katze\nкошка\t猫 🐈‍⬛ e\u0301"
  assert check(pipe, prompt=text).prompt == text


@pytest.mark.parametrize(
  "name", ["../../etc/passwd", "/etc/passwd", "style/../style", "", "STYLE"]
)
def test_an_adapter_is_one_of_those_there_are_by_its_very_name(pipe, name):
  assert check(pipe, loras=("style",), lora="style").lora == "style"
  with pytest.raises(InvalidRequestError, match="one of style") as caught:
    check(pipe, loras=("style",), lora=name)
  assert caught.value.field == "lora"


def test_sizes_of_pictures_are_limited_and_must_agree(pipe):
  limits = Limits(max_upload_pixels=100)
  image = PIL.Image.new("RGB", (32, 32))
  request = requests.GenerationRequest(prompt="a", image=image)
  with pytest.raises(InvalidRequestError, match="at most 100"):
    requests.check(request, pipe, limits)
  mask = PIL.Image.new("L", (16, 32))
  with pytest.raises(InvalidRequestError, match="same size") as caught:
    check(pipe, image=image, mask_image=mask)
  assert caught.value.field == "mask_image"


def test_a_mask_must_cover_something(pipe):
  image = PIL.Image.new("RGB", (64, 64), "red")
  mask = PIL.Image.new("L", image.size)
  with pytest.raises(InvalidRequestError, match="is too small") as caught:
    check(pipe, image=image, mask_image=mask)
  assert caught.value.field == "mask_image"
  assert "of 4x4 pixels" in str(caught.value)
  mask.paste(255, (8, 8, 11, 11))  # less than half of its latent
  with pytest.raises(InvalidRequestError, match="is too small"):
    check(pipe, image=image, mask_image=mask)
  mask.paste(255, (8, 8, 16, 16))
  assert check(pipe, image=image, mask_image=mask).mask_image is not None


def test_sprint_has_no_negative_prompt_and_one_solver(tokenizer):
  sprint = tiny.make_pipeline(tokenizer, solver=schedules.SCM())
  assert check(sprint).solver == "SCM"
  with pytest.raises(InvalidRequestError, match="Sprint") as caught:
    check(sprint, negative_prompt="blurry")
  assert caught.value.field == "negative_prompt"
  with pytest.raises(InvalidRequestError, match="SCM"):
    check(sprint, solver="FlowEuler")


def test_solvers_share_the_shift_and_the_own_one_is_first():
  found = solvers.of(schedules.FlowEuler(shift=2.0))
  assert list(found) == ["FlowEuler", "FlowDPMSolver"]
  assert found["FlowDPMSolver"].flow_shift == 2.0
  assert solvers.of(found["FlowDPMSolver"])["FlowEuler"].shift == 2.0


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", None])
def test_limits_are_whole_numbers_of_at_least_one(value):
  with pytest.raises(ValueError, match="max_images"):
    Limits(max_images=value)


def test_the_limit_of_pixels_is_the_checkpoints_unless_given(pipe):
  assert Limits().of(pipe).max_pixels == 2 * 32 * 32
  assert Limits(max_pixels=5).of(pipe).max_pixels == 5
