"""Trains a small tokenizer in Gemma's format on one's own captions."""

import collections
import json
import pathlib
from collections.abc import Iterable

import tokenizers
from tokenizers import (
  decoders,
  models,
  normalizers,
  pre_tokenizers,
  processors,
  trainers,
)

_SPACE = "\u2581"
_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_RESERVED = _SPECIAL + _BYTES


def train_tokenizer(
  captions: Iterable[str],
  vocab_size: int,
  output_dir: str | pathlib.Path,
) -> tokenizers.Tokenizer:
  """Writes `tokenizer.json` and its two companions; returns the tokenizer.

  Byte-pair encoding in which a space is U+2581 at the start of a word, digits
  and punctuation stand alone, and unknown characters fall back to bytes, so
  that every text survives. The order of the captions does not matter.

  Args:
    captions: texts as they will be encoded (lower-cased, if prompts are).
    vocab_size: number of ids, 261 of which are special symbols and bytes.
      The result has fewer when the captions do not offer as many words.

  Raises:
    ValueError: no captions, or a vocabulary without room for words.
  """
  captions = sorted(captions)
  if not captions:
    raise ValueError("captions is empty: a tokenizer needs text to learn from.")
  if vocab_size <= len(_RESERVED):
    raise ValueError(
      f"vocab_size must exceed {len(_RESERVED)}, the special symbols and "
      f"bytes; got {vocab_size}."
    )
  words, merges = _learn(captions, vocab_size - len(_RESERVED))
  vocab = {token: i for i, token in enumerate((*_RESERVED, *words))}
  tokenizer = _assemble(vocab, merges)
  output_dir = pathlib.Path(output_dir)
  output_dir.mkdir(parents=True, exist_ok=True)
  tokenizer.save(str(output_dir / "tokenizer.json"))
  for name, content in (
    ("tokenizer_config.json", _config()),
    ("special_tokens_map.json", _special_tokens()),
  ):
    (output_dir / name).write_text(
      json.dumps(content, indent=2) + "\n", encoding="utf-8"
    )
  return tokenizer


def _learn(
  captions: list[str], size: int
) -> tuple[list[str], list[tuple[str, str]]]:
  """Returns the tokens in order of discovery, and the merges."""
  learner = tokenizers.Tokenizer(models.BPE())
  learner.normalizer = normalizers.Replace(" ", _SPACE)
  # Merges never cross these borders, so the finished tokenizer
  # needs no splitting: no token of it spans one.
  learner.pre_tokenizer = pre_tokenizers.Sequence(
    [
      pre_tokenizers.Split(_SPACE, "merged_with_next"),
      pre_tokenizers.Punctuation("isolated"),
      pre_tokenizers.Digits(individual_digits=True),
    ]
  )
  # A rare character is better spelt in bytes than given a token. The library
  # would break ties between rare characters at random.
  counts = collections.Counter(char for caption in captions for char in caption)
  counts[_SPACE] += counts.pop(" ", 0)
  common = sorted(counts, key=lambda char: (-counts[char], char))
  common = common[: max(size // 2, 1)]
  trainer = trainers.BpeTrainer(
    vocab_size=size,
    initial_alphabet=common,
    limit_alphabet=len(common),
    show_progress=False,
  )
  learner.train_from_iterator(captions, trainer)
  model = json.loads(learner.to_str())["model"]
  words = sorted(model["vocab"], key=model["vocab"].get)
  return words, [tuple(merge) for merge in model["merges"]]


def _assemble(
  vocab: dict[str, int], merges: list[tuple[str, str]]
) -> tokenizers.Tokenizer:
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
    )
  )
  tokenizer.add_special_tokens(
    [tokenizers.AddedToken(t, normalized=False) for t in _SPECIAL]
  )
  tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
  )
  tokenizer.post_processor = processors.TemplateProcessing(
    single="<bos> $A",
    pair="<bos> $A <bos>:1 $B:1",
    special_tokens=[("<bos>", vocab["<bos>"])],
  )
  return tokenizer


def _special_tokens() -> dict[str, str]:
  return {f"{token.strip('<>')}_token": token for token in _SPECIAL}


def _config() -> dict[str, str | bool]:
  return {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "padding_side": "right",
    **_special_tokens(),
  }
