"""Texts are padded no further than a call needs, and nobody sees it."""

import dataclasses
import itertools

import numpy as np
import pytest

from sana_jax import pipeline as pipeline_lib
from sana_jax import text
from sana_jax.diffusion import schedules
from tests import tiny

LENGTHS, MOST = (16, 8), 24


@pytest.fixture(autouse=True)
def wide_window(monkeypatch):
  """Has the encoder's window hold all tokens, as Gemma's 4096 do."""
  narrow = tiny.text_encoder_config
  monkeypatch.setattr(
    tiny,
    "text_encoder_config",
    lambda size: dataclasses.replace(narrow(size), sliding_window=4096),
  )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(directory)
  return directory


def make_pipeline(tokenizer, **options) -> pipeline_lib.SanaPipeline:
  pipe = tiny.make_pipeline(tokenizer, **options)
  pipe.generation_config.max_sequence_length = MOST
  pipe.generation_config.num_inference_steps = 2
  pipe.text_lengths = LENGTHS
  return pipe


def prompt_of(pipe, length: int, **instruction) -> str:
  """Returns a prompt that needs a `max_sequence_length` of just that."""
  for count, tail in itertools.product(range(1, 30), range(3)):
    prompt = " ".join("gabedic"[i % 7] for i in range(count)) + "z" * tail
    if text.prompt_lengths(pipe.tokenizer, [prompt], **instruction) == [length]:
      return prompt
  raise AssertionError(f"no prompt of {length} tokens")


@pytest.mark.parametrize(
  ("options", "call", "instruction"),
  [
    ({}, {"guidance_scale": 4.5}, tiny.INSTRUCTION),
    ({}, {"guidance_scale": 2.0, "null_mask": "caption"}, None),
    # Compiled quickly, it is rounded by more than is allowed here.
    pytest.param(
      *({}, {"guidance_scale": 4.5, "null_mask": "caption"}, None),
      marks=pytest.mark.slow,
    ),
    ({}, {"guidance_scale": 1.0, "pag_scale": 2.0}, None),
    ({"solver": schedules.SCM()}, {}, tiny.INSTRUCTION),
    ({"controlnet": True}, {"control_image": ...}, None),
  ],
)
def test_padding_that_is_left_out_changes_no_image(
  tokenizer, rng, options, call, instruction
):
  pipe = make_pipeline(tokenizer, **options)
  call = {"complex_human_instruction": instruction} | call
  if "control_image" in call:
    call["control_image"] = rng.random((32, 32, 3)).astype(np.float32)
  prompt = prompt_of(pipe, 8, complex_human_instruction=instruction)
  cut = pipe(prompt, **call)
  assert cut.text_length == 8
  pipe.text_lengths = ()
  whole = pipe(prompt, **call)
  assert whole.text_length == MOST
  # float32, sums in another order; latents are of order 1
  np.testing.assert_allclose(cut.latents, whole.latents, rtol=0, atol=1e-4)


def test_the_longest_text_of_a_call_decides(tokenizer):
  pipe = make_pipeline(tokenizer)
  pipe.generation_config.complex_human_instruction = None
  pipe.generation_config.num_inference_steps = 1
  by_length = {n: prompt_of(pipe, n) for n in (3, 8, 9, 16, 17, MOST, MOST + 1)}

  def length(*tokens, **call) -> int:
    return pipe([by_length[n] for n in tokens], **call).text_length

  assert length(3, 8) == 8
  assert length(8, 9) == length(3, 16) == 16
  assert length(3, 17) == length(8, MOST) == MOST
  assert length(3, 8, negative_prompt=by_length[9]) == 16


@pytest.mark.usefixtures("nothing_compiled")
def test_prompts_compile_as_many_programs_as_there_are_lengths(tokenizer):
  pipe = make_pipeline(tokenizer)
  pipe.generation_config.complex_human_instruction = None
  pipe.generation_config.num_inference_steps = 1
  compiled = []

  def progress(event):
    if event.phase == "compile" and event.seconds is None:
      compiled.append(event.stage)

  prompts = [prompt_of(pipe, n) for n in (3, 8, 9, 16, 17, MOST, 3, 17, 9)]
  found = [pipe(prompt, progress=progress).text_length for prompt in prompts]
  assert found == [8, 8, 16, 16, MOST, MOST, 8, MOST, 16]
  assert sorted(compiled) == sorted(
    ["text encoder", "transformer"] * 3 + ["decoder"]
  )


def test_what_was_made_before_does_not_show(tokenizer):
  # A bulk run that is continued must make what the uninterrupted one does.
  pipe = make_pipeline(tokenizer)
  pipe.prompt_batch_size = 2
  prompts = [prompt_of(pipe, 5), prompt_of(pipe, 12)]
  fresh = dataclasses.replace(pipe)
  alone = pipe(prompts[:1] * 2)
  assert alone.text_length == 8
  later = pipe(prompts)
  assert later.text_length == 16
  np.testing.assert_array_equal(later.images, fresh(prompts).images)
