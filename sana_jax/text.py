"""Prompts to token ids to the hidden states that condition the transformer."""

import functools
import hashlib
import importlib.resources
import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
import tokenizers
from jaxtyping import Array, Bool, Float, Int, Int32

from sana_jax import notices

_BOS, _PAD = "<bos>", "<pad>"
# Characters of what is dropped, in a warning.
_MAX_QUOTED = 100


class Tokenizer:
  """Turns texts into Gemma token ids, `<bos>` first."""

  def __init__(self, backend: "_Fast | _SentencePiece"):
    self._backend = backend
    self.bos_id = backend.bos_id
    self.pad_id = backend.pad_id
    self.vocab_size = backend.vocab_size

  @classmethod
  def from_pretrained(cls, directory: str | pathlib.Path) -> "Tokenizer":
    """Reads `tokenizer.json`, or else SentencePiece's `tokenizer.model`.

    Raises:
      FileNotFoundError: the directory has neither.
      ValueError: the vocabulary has no `<bos>` or no `<pad>`.
    """
    path = _tokenizer_file(directory)
    backend = _Fast if path.suffix == ".json" else _SentencePiece
    tokenizer = cls(backend(path))
    if tokenizer.bos_id is None or tokenizer.pad_id is None:
      raise ValueError(
        f"The tokenizer in {directory} lacks {_BOS} or {_PAD}: expected a "
        f"Gemma vocabulary."
      )
    return tokenizer

  def tokenize(self, text: str) -> list[int]:
    """Returns the ids of one text, `<bos>` included, without padding."""
    return [self.bos_id, *self._backend.to_ids(text)]

  def decode(self, ids: Sequence[int]) -> str:
    return self._backend.to_text([int(i) for i in ids])

  def encode(
    self,
    texts: Sequence[str],
    max_length: int,
    padding_side: str = "right",
    *,
    warn: bool = True,
  ) -> tuple[Int32[np.ndarray, "b l"], Int32[np.ndarray, "b l"]]:
    """Returns ids and mask (1 text, 0 padding), all `max_length` long.

    A longer text loses its end, with a warning that quotes what was lost.

    Args:
      max_length: tokens per text, `<bos>` included.
      padding_side: "right" or "left".
      warn: False: a longer text loses its end silently.

    Raises:
      ValueError: no texts, something that is not a string, or a length or
        side that cannot be.
    """
    _check_texts(texts)
    if max_length < 1:
      raise ValueError(f"max_length must be at least 1, got {max_length}.")
    if padding_side not in ("right", "left"):
      raise ValueError(
        f"padding_side must be 'right' or 'left', got {padding_side!r}."
      )
    input_ids = np.full((len(texts), max_length), self.pad_id, np.int32)
    mask = np.zeros_like(input_ids)
    for row, text in enumerate(texts):
      ids = self.tokenize(text)
      if warn and len(ids) > max_length:
        dropped = self.decode(ids[max_length:])
        if len(dropped) > _MAX_QUOTED:
          dropped = f"{dropped[:_MAX_QUOTED]}…"
        notices.warn(
          f"A prompt is too long: {max_length} of its {len(ids)} tokens are "
          f"read. Its end was dropped: {dropped!r}.",
          stacklevel=2,
        )
      ids = ids[:max_length]
      start = 0 if padding_side == "right" else max_length - len(ids)
      input_ids[row, start : start + len(ids)] = ids
      mask[row, start : start + len(ids)] = 1
    return input_ids, mask


def _tokenizer_file(directory: str | pathlib.Path) -> pathlib.Path:
  for name in ("tokenizer.json", "tokenizer.model"):
    path = pathlib.Path(directory) / name
    if path.is_file():
      return path
  raise FileNotFoundError(
    f"No tokenizer in {directory}: expected tokenizer.json or tokenizer.model."
  )


def tokenizer_sha256(directory: str | pathlib.Path) -> str:
  """Returns the digest of the file that `Tokenizer.from_pretrained` reads.

  Raises:
    FileNotFoundError: there is none.
  """
  return hashlib.sha256(_tokenizer_file(directory).read_bytes()).hexdigest()


def instruction_sha256(lines: Sequence[str] | None) -> str | None:
  """Returns the digest of a complex human instruction; None: there is none."""
  if not lines:
    return None
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _Fast:
  """`tokenizer.json`, which is authoritative where both files exist."""

  def __init__(self, path: pathlib.Path):
    self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    # A file may carry settings of its last user; lengths are our business.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.bos_id = self._tokenizer.token_to_id(_BOS)
    self.pad_id = self._tokenizer.token_to_id(_PAD)
    self.vocab_size = self._tokenizer.get_vocab_size()

  def to_ids(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def to_text(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=False)


class _SentencePiece:
  """`tokenizer.model`, made to agree with `tokenizer.json`.

  SentencePiece itself reads `<eos>` in a text as five characters;
  `tokenizer.json` reads control symbols as such.
  """

  def __init__(self, path: pathlib.Path):
    self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = {
      self._model.id_to_piece(i): i
      for i in range(self._model.vocab_size())
      if self._model.is_control(i) or self._model.is_unknown(i)
    }
    self._controls = pieces
    self._splitter = "(" + "|".join(map(re.escape, pieces)) + ")"
    self.bos_id = pieces.get(_BOS)
    self.pad_id = pieces.get(_PAD)
    self.vocab_size = self._model.vocab_size()

  def to_ids(self, text: str) -> list[int]:
    ids = []
    for part in re.split(self._splitter, text):
      if part in self._controls:
        ids.append(self._controls[part])
      else:
        ids.extend(self._model.encode(part))
    return ids

  def to_text(self, ids: list[int]) -> str:
    return self._model.decode(ids)


def prepare(prompt: str, *, lowercase: bool = True) -> str:
  """Strips a prompt and, as diffusers does, lower-cases it."""
  return (prompt.lower() if lowercase else prompt).strip()


def default_instruction(*, double_quotes: bool = False) -> tuple[str, ...]:
  """Returns SANA's complex human instruction, line by line.

  Args:
    double_quotes: the quotation marks of the original release; the published
      diffusers pipelines have single ones.

  Source: SANA, arXiv:2410.10629, section 2.3; files named in the asset.
  """
  asset = importlib.resources.files("sana_jax.assets") / "prompting.json"
  data = json.loads(asset.read_text(encoding="utf-8"))
  lines = data["complex_human_instruction"]["lines"]
  return tuple(
    line.replace("'", '"') if double_quotes else line for line in lines
  )


def tokenize_prompts(
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  *,
  complex_human_instruction: Sequence[str] | None = None,
  max_sequence_length: int = 300,
  lowercase: bool = True,
  warn: bool = True,
) -> tuple[Int32[np.ndarray, "b l"], Int32[np.ndarray, "b l"]]:
  """Returns padded ids and mask of prepared prompts, instruction in front.

  With an instruction of n tokens, l = n + max_sequence_length - 2: its `<bos>`
  is kept for the prompt, and the space it ends with merges into the prompt.

  Args:
    complex_human_instruction: lines, never for a negative prompt.
    max_sequence_length: tokens that `encode_tokens` keeps.
    warn: see `Tokenizer.encode`.

  Raises:
    ValueError: no prompts, something that is not a string, or an instruction
      that is one string.
  """
  texts, instructing = _instructed(
    tokenizer, prompts, complex_human_instruction, lowercase
  )
  return tokenizer.encode(texts, instructing + max_sequence_length, warn=warn)


def prompt_lengths(
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  *,
  complex_human_instruction: Sequence[str] | None = None,
  lowercase: bool = True,
) -> list[int]:
  """Returns the `max_sequence_length` that each prompt needs to be kept whole.

  See `tokenize_prompts` for the arguments and what it raises.
  """
  texts, instructing = _instructed(
    tokenizer, prompts, complex_human_instruction, lowercase
  )
  return [len(tokenizer.tokenize(text)) - instructing for text in texts]


def _instructed(
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  instruction: Sequence[str] | None,
  lowercase: bool,
) -> tuple[list[str], int]:
  """Prepares prompts; says how many tokens the instruction takes of each."""
  _check_texts(prompts)
  if isinstance(instruction, str):
    raise ValueError(
      "complex_human_instruction must be a list of lines, got one string."
    )
  texts = [prepare(prompt, lowercase=lowercase) for prompt in prompts]
  if not instruction:
    return texts, 0
  lines = "\n".join(instruction)
  return [lines + text for text in texts], len(tokenizer.tokenize(lines)) - 2


def instruction_ids(
  tokenizer: Tokenizer, complex_human_instruction: Sequence[str] | None
) -> Int32[np.ndarray, "p"]:
  """Returns what the ids of prompts behind an instruction begin with.

  That is its tokens but the last, which merges into the prompt. A prompt may
  undo more of them: `begins_with` tells.
  """
  if not complex_human_instruction:
    return np.zeros(0, np.int32)
  ids = tokenizer.tokenize("\n".join(complex_human_instruction))
  return np.array(ids[:-1], np.int32)


def begins_with(
  ids: Int32[np.ndarray, "p"],
  input_ids: Int32[np.ndarray, "b l"],
  attention_mask: Int32[np.ndarray, "b l"],
) -> Bool[np.ndarray, "b"]:
  """Tells which rows are texts that begin with these ids, and have others."""
  count = len(ids)
  if not 0 < count < input_ids.shape[1]:
    return np.zeros(len(input_ids), bool)
  same = (input_ids[:, :count] == ids[None]).all(axis=1)
  return same & (attention_mask[:, :count] == 1).all(axis=1)


@functools.partial(jax.jit, static_argnames="max_sequence_length")
def encode_tokens(
  text_encoder: Callable[..., Array],
  input_ids: Int[Array, "b l"],
  attention_mask: Int[Array, "b l"],
  *,
  prefix: Any = None,
  max_sequence_length: int = 300,
) -> tuple[Float[Array, "b kept d"], Bool[Array, "b kept"]]:
  """Returns text states and mask: the first token, then the last ones.

  The tokens left out are the instruction, whose content the kept ones have
  attended to.

  Args:
    text_encoder: a pytree with Gemma2's `__call__`.
    prefix: what its `read_prefix` made of the ids that all rows begin with,
      up to the last ones that are kept, which are not read again; None: all
      are read.
    max_sequence_length: number of tokens kept.

  Raises:
    ValueError: the prefix does not end where the last tokens begin.
  """
  length = input_ids.shape[1]
  before = length - max_sequence_length + 1
  keep = np.concatenate([[0], np.arange(before, length)])
  if prefix is None:
    states = text_encoder(input_ids, attention_mask)[:, keep]
  else:
    read = prefix.past.keys.shape[-3]
    if read != before:
      raise ValueError(
        f"The prefix has {read} tokens, expected {before}: all of {length} "
        f"but the last {length - before}, which are kept."
      )
    rest = text_encoder(
      input_ids[:, before:], attention_mask[:, before:], prefix
    )
    first = jnp.broadcast_to(prefix.first, (rest.shape[0], 1, rest.shape[2]))
    states = jnp.concatenate([first, rest], axis=1)
  return states, attention_mask[:, keep].astype(bool)


def encode_prompts(
  text_encoder: Callable[..., Array],
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  *,
  complex_human_instruction: Sequence[str] | None = None,
  max_sequence_length: int = 300,
  lowercase: bool = True,
) -> tuple[Float[Array, "b kept d"], Bool[Array, "b kept"]]:
  """Returns the text states and mask that condition the transformer.

  See `tokenize_prompts` for the arguments, and `encode_tokens`.
  """
  input_ids, attention_mask = tokenize_prompts(
    tokenizer,
    prompts,
    complex_human_instruction=complex_human_instruction,
    max_sequence_length=max_sequence_length,
    lowercase=lowercase,
  )
  return encode_tokens(
    text_encoder,
    jnp.asarray(input_ids),
    jnp.asarray(attention_mask),
    max_sequence_length=max_sequence_length,
  )


def _check_texts(texts: Any) -> None:
  if isinstance(texts, str) or not len(texts):
    raise ValueError(
      f"prompts must be a list of at least one string, got {texts!r}."
    )
  wrong = [text for text in texts if not isinstance(text, str)]
  if wrong:
    raise ValueError(f"prompts must be strings, got {wrong[0]!r}.")
