"""Tokenizers of both kinds, and the path from prompts to text states."""

import hashlib
import io
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import tokenizers

from sana_jax import text
from sana_jax.data import tokenizer_training

CAPTIONS = (
  "a red apple",
  "a green apple on a table",
  "a cat, sleeping on the red table",
  "describe the picture: a cat",
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
  """A directory with a tokenizer.json."""
  path = tmp_path_factory.mktemp("tokenizer")
  tokenizer_training.train_tokenizer(CAPTIONS, 320, path)
  return path


@pytest.fixture(scope="module")
def tokenizer(directory):
  return text.Tokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def sentencepiece_file():
  """The bytes of a tokenizer.model."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(CAPTIONS),
    model_writer=model,
    model_type="bpe",
    vocab_size=310,
    byte_fallback=True,
    add_dummy_prefix=False,
    remove_extra_whitespaces=False,
    normalization_rule_name="identity",
    user_defined_symbols=["<b>"],
    pad_id=0,
    eos_id=1,
    bos_id=2,
    unk_id=3,
    bos_piece="<bos>",
    eos_piece="<eos>",
    pad_piece="<pad>",
    minloglevel=2,
  )
  return model.getvalue()


def identity_encoder():
  """A text encoder whose state is the token id."""
  return jax.tree_util.Partial(
    lambda ids, mask: (ids * mask)[..., None].astype(jnp.float32)
  )


def test_ids_begin_with_bos_and_decode_to_the_text(tokenizer):
  for prompt in (*CAPTIONS, "", " two  spaces ", "日本 🦊\n12"):
    ids = tokenizer.tokenize(prompt)
    assert ids[0] == tokenizer.bos_id == 2
    assert tokenizer.decode(ids[1:]) == prompt


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_fills_the_chosen_side(tokenizer, side):
  texts = ["", "a red apple"]
  ids, mask = tokenizer.encode(texts, 9, padding_side=side)
  assert ids.dtype == mask.dtype == np.int32
  for row, prompt in enumerate(texts):
    tokens = tokenizer.tokenize(prompt)
    padding = 9 - len(tokens)
    expected = np.pad(tokens, (0, padding) if side == "right" else (padding, 0))
    np.testing.assert_array_equal(ids[row], expected)
    np.testing.assert_array_equal(mask[row], expected > 0)


def test_a_long_text_loses_its_end_and_says_so(tokenizer):
  tokens = tokenizer.tokenize("a red apple")
  lost = tokenizer.decode(tokens[2:])
  with pytest.warns(UserWarning, match=f"dropped: '{lost}'"):
    ids, mask = tokenizer.encode(["a red apple"], 2, padding_side="left")
  np.testing.assert_array_equal(ids[0], tokens[:2])
  assert mask.all()
  long = "apple " * 200
  lost = tokenizer.decode(tokenizer.tokenize(long)[2:])
  with pytest.warns(UserWarning, match=f"dropped: '{lost[:100]}…'[.]$"):
    tokenizer.encode([long], 2)
  # Warnings are errors here.
  quiet, _ = tokenizer.encode(["a red apple"], 2, warn=False)
  np.testing.assert_array_equal(quiet, ids)


@pytest.mark.parametrize(
  ("texts", "length", "side", "message"),
  [
    ([], 4, "right", "list of at least one string, got"),
    ("a cat", 4, "right", "list of at least one string, got 'a cat'"),
    (["a cat", None], 4, "right", "prompts must be strings, got None"),
    (["a cat"], 0, "right", "max_length must be at least 1, got 0"),
    (["a cat"], 4, "top", "padding_side must be 'right' or 'left', got 'top'"),
  ],
)
@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_encoded_is_an_error(
  tokenizer, texts, length, side, message
):
  with pytest.raises(ValueError, match=message):
    tokenizer.encode(texts, length, side)


def test_a_directory_without_tokenizer_names_both_files(tmp_path):
  expected = "expected tokenizer.json or tokenizer.model"
  with pytest.raises(FileNotFoundError, match=expected):
    text.Tokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_of_another_family_is_an_error(tmp_path):
  other = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
  other.save(str(tmp_path / "tokenizer.json"))
  with pytest.raises(ValueError, match="lacks <bos> or <pad>"):
    text.Tokenizer.from_pretrained(tmp_path)


def test_settings_of_a_former_user_do_not_shorten_texts(directory, tmp_path):
  used = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
  expected = text.Tokenizer.from_pretrained(directory).tokenize(CAPTIONS[1])
  used.enable_truncation(3)
  used.enable_padding(length=40)
  used.save(str(tmp_path / "tokenizer.json"))
  tokenizer = text.Tokenizer.from_pretrained(tmp_path)
  assert tokenizer.tokenize(CAPTIONS[1]) == expected


def test_sentencepiece_reads_symbols_in_a_text_as_symbols(
  sentencepiece_file, tmp_path
):
  (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file)
  tokenizer = text.Tokenizer.from_pretrained(tmp_path)
  model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_file)
  bold = model.piece_to_id("<b>")
  ids = tokenizer.tokenize("<b>cat<eos> 🦊<unk>")
  assert ids == [2, bold, *model.encode("cat"), 1, *model.encode(" 🦊"), 3]
  assert tokenizer.vocab_size == 310
  assert tokenizer.decode(tokenizer.tokenize("a red 🦊")[1:]) == "a red 🦊"


def test_tokenizer_json_wins_over_tokenizer_model(
  directory, sentencepiece_file, tmp_path
):
  (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file)
  content = (directory / "tokenizer.json").read_bytes()
  (tmp_path / "tokenizer.json").write_bytes(content)
  assert text.Tokenizer.from_pretrained(tmp_path).vocab_size != 310


def test_prompts_are_stripped_and_lowered_unless_told_otherwise():
  assert text.prepare(" A Red FOX\n") == "a red fox"
  assert text.prepare(" A Red FOX\n", lowercase=False) == "A Red FOX"


@pytest.mark.parametrize(
  ("double_quotes", "sha256"),
  [
    (False, "48290080bb4fd4a264bdc81d0647ac0221359a36506e2b3e954616d6cb48c3da"),
    (True, "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"),
  ],
)
def test_the_default_instruction_is_the_published_one(double_quotes, sha256):
  lines = text.default_instruction(double_quotes=double_quotes)
  assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == sha256


def test_the_instruction_is_read_but_only_the_prompt_is_kept(tokenizer):
  instruction = ("Describe", "the picture: ")
  joined = "describe\nthe picture: "
  count = len(tokenizer.tokenize("Describe\nthe picture: "))
  ids, mask = text.tokenize_prompts(
    tokenizer,
    [" A Cat "],
    complex_human_instruction=instruction,
    max_sequence_length=6,
  )
  assert ids.shape == mask.shape == (1, count + 4)
  full = tokenizer.tokenize("D" + joined[1:] + "a cat")
  np.testing.assert_array_equal(ids[0, : len(full)], full)
  states, kept_mask = text.encode_prompts(
    identity_encoder(),
    tokenizer,
    [" A Cat "],
    complex_human_instruction=instruction,
    max_sequence_length=6,
  )
  kept = [0, *range(count - 1, count + 4)]
  np.testing.assert_array_equal(states[0, :, 0], ids[0, kept])
  np.testing.assert_array_equal(kept_mask[0], mask[0, kept] == 1)


def test_an_instruction_is_known_in_the_prompts_that_do_not_undo_it(tokenizer):
  instruction = ("Describe", "the picture: ")
  prompts = ["A cat", "", "a red apple " * 9]

  def begins(first, prompts):
    ids = text.instruction_ids(tokenizer, instruction)
    found = text.tokenize_prompts(
      tokenizer,
      prompts,
      complex_human_instruction=first,
      max_sequence_length=9,
      warn=False,
    )
    return ids, found, text.begins_with(ids, *found).tolist()

  ids, (input_ids, mask), known = begins(instruction, prompts)
  assert known == [True] * 3
  assert tokenizer.decode(ids[1:]) == "Describe\nthe picture:"
  # All that is left is kept, so nothing is read in vain.
  assert input_ids.shape[1] - len(ids) == 9 - 1
  assert begins(("Describe", "the pictures: "), prompts)[2] == [False] * 3
  padded = mask.copy()
  padded[0, 1] = 0
  assert text.begins_with(ids, input_ids, padded).tolist() == [
    False,
    *known[1:],
  ]
  assert text.instruction_ids(tokenizer, None).size == 0
  assert not text.begins_with(ids[:0], input_ids, mask).any()
  assert not text.begins_with(input_ids[0], input_ids, mask).any()


def test_without_instruction_every_token_is_kept(tokenizer):
  states, mask = text.encode_prompts(
    identity_encoder(), tokenizer, ["", "A CAT"], max_sequence_length=5
  )
  ids, expected = tokenizer.encode(["", "a cat"], 5)
  np.testing.assert_array_equal(states[..., 0], ids)
  np.testing.assert_array_equal(mask, expected == 1)
  assert mask[0].sum() == 1


def test_case_is_kept_on_request(tokenizer):
  kept = text.tokenize_prompts(tokenizer, ["A CAT"], lowercase=False)[0]
  np.testing.assert_array_equal(kept, tokenizer.encode(["A CAT"], 300)[0])


def test_an_instruction_in_one_string_is_an_error(tokenizer):
  with pytest.raises(ValueError, match="must be a list of lines"):
    text.tokenize_prompts(
      tokenizer, ["a cat"], complex_human_instruction="Describe: "
    )


def test_no_prompts_are_an_error(tokenizer):
  with pytest.raises(ValueError, match="list of at least one string"):
    text.encode_prompts(identity_encoder(), tokenizer, [])


def test_a_tokenizer_is_identified_by_the_file_that_is_read(
  directory, sentencepiece_file, tmp_path
):
  (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file)
  expected = hashlib.sha256(sentencepiece_file).hexdigest()
  assert text.tokenizer_sha256(tmp_path) == expected
  content = (directory / "tokenizer.json").read_bytes()
  (tmp_path / "tokenizer.json").write_bytes(content)
  expected = hashlib.sha256(content).hexdigest()
  assert text.tokenizer_sha256(tmp_path) == expected
  with pytest.raises(FileNotFoundError, match="No tokenizer in .*weights"):
    text.tokenizer_sha256(tmp_path / "weights")


def test_an_instruction_is_identified_by_its_lines():
  found = text.instruction_sha256(["one", "two"])
  assert found == hashlib.sha256(b"one\ntwo").hexdigest()
  assert text.instruction_sha256(None) is None
  assert text.instruction_sha256([]) is None


@pytest.mark.parametrize("instruction", [("Describe", "the picture: "), None])
def test_a_prompt_needs_as_many_tokens_as_lose_nothing(tokenizer, instruction):
  prompts = [" A Cat ", "a green table", "zebra", "ünïcode " * 5]
  needed = text.prompt_lengths(
    tokenizer, prompts, complex_human_instruction=instruction
  )
  for prompt, length in zip(prompts, needed, strict=True):
    arguments = {"complex_human_instruction": instruction}
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      _, mask = text.tokenize_prompts(
        tokenizer, [prompt], max_sequence_length=length, **arguments
      )
    assert mask.all()
    with pytest.warns(UserWarning, match="dropped"):
      text.tokenize_prompts(
        tokenizer, [prompt], max_sequence_length=length - 1, **arguments
      )
