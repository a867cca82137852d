"""The trained tokenizer's format, determinism and errors."""

import json
import random
import subprocess
import sys

import pytest

from sana_jax import text
from sana_jax.data import emoji, emoji_tokenizer, tokenizer_training

CAPTIONS = ["woman: red hair", "man: red hair", "red apple, 12 apples"] * 3


def test_the_order_of_captions_does_not_matter(tmp_path):
  # Many equally rare characters: most do not fit, and ties must not be drawn.
  captions = [*CAPTIONS, "".join(map(chr, range(0x4E00, 0x4F00)))]
  contents = set()
  for seed in range(3):
    shuffled = random.Random(seed).sample(captions, len(captions))
    tokenizer_training.train_tokenizer(shuffled, 350, tmp_path / str(seed))
    contents.add((tmp_path / str(seed) / "tokenizer.json").read_bytes())
  assert len(contents) == 1


def test_special_symbols_and_bytes_have_gemma_positions(tmp_path):
  tokenizer = tokenizer_training.train_tokenizer(CAPTIONS, 285, tmp_path)
  symbols = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<0x00>")
  assert [tokenizer.token_to_id(symbol) for symbol in symbols] == [*range(6)]
  assert tokenizer.get_vocab_size() == 285
  assert tokenizer.encode("red").ids[0] == 2


def test_tokens_stay_within_words(tmp_path):
  tokenizer_training.train_tokenizer(CAPTIONS, 320, tmp_path)
  tokenizer = text.Tokenizer.from_pretrained(tmp_path)
  ids = tokenizer.tokenize("woman: red hair, 12")[1:]
  pieces = [tokenizer.decode([i]) for i in ids]
  assert pieces == ["woman", ":", " red", " hair", ",", " ", "1", "2"]


def test_companion_files_name_the_special_tokens(tmp_path):
  tokenizer_training.train_tokenizer(CAPTIONS, 285, tmp_path)
  config = json.loads((tmp_path / "tokenizer_config.json").read_text())
  special = json.loads((tmp_path / "special_tokens_map.json").read_text())
  assert config["tokenizer_class"] == "GemmaTokenizer"
  assert config["add_bos_token"] is True
  assert special["pad_token"] == config["pad_token"] == "<pad>"


@pytest.mark.parametrize(
  ("captions", "vocab_size", "message"),
  [
    ([], 300, "captions is empty"),
    (CAPTIONS, 261, "vocab_size must exceed 261"),
  ],
)
def test_what_cannot_be_learned_from_is_an_error(
  tmp_path, captions, vocab_size, message
):
  with pytest.raises(ValueError, match=message):
    tokenizer_training.train_tokenizer(captions, vocab_size, tmp_path)


def test_emoji_captions_are_lower_case_names_with_keywords():
  source = emoji.load("heldout")
  captions = list(emoji_tokenizer.captions(source))
  assert len(captions) == len(source)
  assert all(caption == caption.lower() for caption in captions)
  assert captions[0].startswith(source[0]["name"].lower())


@pytest.mark.slow
def test_the_command_writes_a_tokenizer(tmp_path):
  command = (sys.executable, "-m", "sana_jax.data.emoji_tokenizer")
  subprocess.run(
    (*command, f"--output_dir={tmp_path}", "--vocab_size=512"), check=True
  )
  tokenizer = text.Tokenizer.from_pretrained(tmp_path)
  assert tokenizer.vocab_size == 512
  assert len(tokenizer.tokenize("red apple")) < 8
