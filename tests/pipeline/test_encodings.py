"""The instruction is read once, and no prompt can tell."""

import dataclasses

import jax
import numpy as np
import pytest

from sana_jax import sharding, text
from sana_jax.pipeline import encodings, execution
from tests import tiny

# "ple on" makes " apple" of the end of this one.
INSTRUCTION = ("Describe it:", "a red cat and describe ap")
UNDOES = "ple on a table"
PROMPTS = ["a red apple", "", "a table", UNDOES, "a green cat " * 9, "on it"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(path)
  return tiny.make_pipeline(path)


def tokenize(pipe, prompts, instruction=INSTRUCTION, length=tiny.LENGTH):
  return encodings.Tokens(
    *text.tokenize_prompts(
      pipe.tokenizer,
      prompts,
      complex_human_instruction=instruction,
      max_sequence_length=length,
      warn=False,
    ),
    text.instruction_ids(pipe.tokenizer, instruction),
  )


def encode(pipe, tokens, *, events=None, devices=1, batch_size=4, **options):
  options = {
    "prefixes": {},
    "encoder": pipe.text_encoder,
    "max_sequence_length": tiny.LENGTH,
  } | options
  return encodings.encode(
    execution.Executor(jax.devices()[:devices]),
    tokens=tokens,
    batch_size=batch_size,
    progress=None if events is None else events.append,
    **options,
  )


def runs(events) -> int:
  return sum(e.phase == "run" and e.seconds is not None for e in events)


def whole(pipe, tokens, length=tiny.LENGTH):
  return text.encode_tokens(
    pipe.text_encoder, *tokens[:2], max_sequence_length=length
  )


@pytest.mark.parametrize("devices", [1, 8])
def test_every_prompt_gives_what_it_gives_when_all_is_read(pipe, devices):
  tokens = tokenize(pipe, PROMPTS)
  begins = text.begins_with(
    tokens.instruction_ids, tokens.input_ids, tokens.attention_mask
  )
  assert [p for p, b in zip(PROMPTS, begins, strict=True) if not b] == [UNDOES]
  assert tokens.attention_mask[4].all()  # the long one lost its end
  window = pipe.text_encoder_config.sliding_window
  assert window < len(tokens.instruction_ids)
  events = []
  with jax.default_matmul_precision("highest"):
    states, mask = encode(pipe, tokens, events=events, devices=devices)
    expected, expected_mask = whole(pipe, tokens)
  np.testing.assert_array_equal(mask, expected_mask)
  # The same sums over other shapes of arrays.
  np.testing.assert_allclose(states, expected, rtol=1e-5, atol=1e-5)
  # The instruction, two batches that go on from it, and one read whole.
  assert runs(events) == 4


@pytest.mark.parametrize(
  ("instruction", "length"), [(("a",), 1), (("a",), 2), (("",), 4), (None, 4)]
)
def test_short_instructions_and_texts_are_no_exception(
  pipe, instruction, length
):
  tokens = tokenize(pipe, ["a cat", ""], instruction, length)
  states, mask = encode(pipe, tokens, max_sequence_length=length)
  expected, expected_mask = whole(pipe, tokens, length)
  np.testing.assert_array_equal(mask, expected_mask)
  np.testing.assert_allclose(states, expected, rtol=1e-4, atol=1e-5)


def test_an_instruction_of_another_length_is_refused(pipe):
  tokens = tokenize(pipe, ["a cat"])
  prefix = pipe.text_encoder.read_prefix(tokens.instruction_ids[:-1])
  count = len(tokens.instruction_ids)
  with pytest.raises(ValueError, match=f"{count - 1} tokens, expected {count}"):
    text.encode_tokens(
      pipe.text_encoder,
      *tokens[:2],
      prefix=prefix,
      max_sequence_length=tiny.LENGTH,
    )


def test_a_prompt_gives_the_same_bits_beside_any_others(pipe):
  prefixes = {}
  together = encode(pipe, tokenize(pipe, PROMPTS), prefixes=prefixes)
  for i, prompt in enumerate(PROMPTS):
    tokens = tokenize(pipe, [prompt])
    alone = encode(pipe, tokens, prefixes=prefixes)
    np.testing.assert_array_equal(alone.states[0], together.states[i])


def test_an_encoder_on_the_host_comes_to_the_devices_once(pipe, monkeypatch):
  encoder = jax.device_get(pipe.text_encoder)
  embedding = jax.tree.leaves(encoder)[0]
  moved = []

  def device_put(x, *args, **kwargs):
    moved.extend(leaf for leaf in jax.tree.leaves(x) if leaf is embedding)
    return put(x, *args, **kwargs)

  put = jax.device_put
  monkeypatch.setattr(jax, "device_put", device_put)
  events = []
  encode(
    pipe, tokenize(pipe, PROMPTS), encoder=encoder, events=events, devices=8
  )
  assert runs(events) == 4
  assert len(moved) == 1


def test_memory_that_runs_out_as_an_encoder_comes_is_the_stages(pipe):
  class Full(execution.Executor):
    def place(self, tree):
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: much")

  with pytest.raises(execution.StageMemoryError, match="in the text encoder"):
    encodings.encode(
      Full(jax.devices()[:1]),
      pipe.text_encoder,
      tokenize(pipe, ["a cat"]),
      {},
      batch_size=1,
      max_sequence_length=tiny.LENGTH,
    )


def test_another_encoder_or_instruction_is_read_anew(pipe):
  pipe = dataclasses.replace(pipe)
  events = []

  def states(prompt, instruction):
    settings = pipe.generation_config.replace(
      {"complex_human_instruction": instruction}
    )
    return pipe.encode_prompt([prompt], settings, progress=events.append).states

  def check(prompt, instruction, count):
    events.clear()
    found = states(prompt, instruction)
    assert runs(events) == count
    expected, _ = whole(pipe, tokenize(pipe, [prompt], instruction))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert len(pipe._encodings._prefixes) == 1

  check("a cat", INSTRUCTION, 2)
  check("a table", INSTRUCTION, 1)
  check("a table", tiny.INSTRUCTION, 2)
  pipe.text_encoder = jax.tree.map(lambda w: 1.2 * w, pipe.text_encoder)
  check("a table", tiny.INSTRUCTION, 2)
  # As in training, at every sampling.
  pipe.text_encoder = sharding.gather(pipe.text_encoder)
  check("a table", tiny.INSTRUCTION, 0)
  check("a cat", tiny.INSTRUCTION, 1)
  # On the host it is the same encoder.
  plan = pipe.plan_memory()._replace(offload_text_encoder=True)
  pipe._offload_text_encoder(plan)
  check("a red apple", tiny.INSTRUCTION, 1)
