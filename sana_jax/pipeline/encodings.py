"""Encodes every distinct prompt once, and the instruction before them once."""

import functools
import operator
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Int32

from sana_jax import text
from sana_jax.models import gemma2
from sana_jax.pipeline import execution, stages
from sana_jax.pipeline.denoising import Condition

_STAGE = "text encoder"
# On the host: 300 tokens of a 2304-wide encoder are 1.4 MB in bfloat16.
_CAPACITY = 256


class Tokens(NamedTuple):
  """Prompts for the text encoder.

  Attributes:
    instruction_ids: what is read once, of `text.instruction_ids`.
  """

  input_ids: Int32[np.ndarray, "b l"]
  attention_mask: Int32[np.ndarray, "b l"]
  instruction_ids: Int32[np.ndarray, "p"]


# What an encoder made of the instruction it read last, by its ids.
Prefixes = dict[bytes, gemma2.Prefix]


def encode(
  executor: execution.Executor,
  encoder: Any,
  tokens: Tokens,
  prefixes: Prefixes,
  *,
  batch_size: int,
  max_sequence_length: int,
  function: Callable[..., Condition] = stages.encode_text,
  progress: execution.ProgressFn | None = None,
) -> Condition:
  """Returns the text states of every row, on the host.

  Rows that begin with the instruction's ids go on from what it gave; the others
  are read whole. A batch is of one kind and filled up to one size: what a row
  gives does not depend on those beside it.

  Args:
    encoder: comes to the devices once, wherever it is.
    prefixes: of this encoder; is changed.
    function: `stages.encode_text` or a variant of it.
  """
  with execution.named(_STAGE):
    encoder = executor.place(encoder)

  def run(rows, prefix):
    condition = executor.run(
      _STAGE,
      function,
      shared={"text_encoder": encoder, "prefix": prefix},
      batched={
        "input_ids": tokens.input_ids[rows],
        "attention_mask": tokens.attention_mask[rows],
      },
      static={"max_sequence_length": max_sequence_length},
      progress=progress,
    )
    return zip(*map(np.asarray, condition), strict=True)

  begins = text.begins_with(
    tokens.instruction_ids, tokens.input_ids, tokens.attention_mask
  )
  found = {}
  for kind in np.unique(begins):
    prefix = None
    if kind:
      prefix = _prefix(executor, encoder, tokens, prefixes, progress)
    rows = np.flatnonzero(begins == kind)
    for start in range(0, len(rows), batch_size):
      batch = rows[start : start + batch_size]
      filled = np.pad(batch, (0, batch_size - len(batch)), mode="edge")
      found |= dict(zip(filled, run(filled, prefix), strict=True))
  ordered = [found[row] for row in range(len(begins))]
  return Condition(*map(np.stack, zip(*ordered, strict=True)))


def _prefix(executor, encoder, tokens, prefixes, progress) -> gemma2.Prefix:
  key = tokens.instruction_ids.tobytes()
  if key not in prefixes:
    prefix = executor.run_on_first(
      _STAGE,
      stages.read_prefix,
      arguments={
        "text_encoder": encoder,
        "input_ids": tokens.instruction_ids,
      },
      static={},
      progress=progress,
    )
    # One at a time: it occupies the devices, and is seldom another.
    prefixes.clear()
    with execution.named(_STAGE):
      prefixes[key] = executor.place(prefix)
  return prefixes[key]


class EncodingCache:
  """Keeps the text states of the prompts used last, on the host."""

  def __init__(self):
    self._encoder: Any = None
    self._prefixes: Prefixes = {}
    self._rows: OrderedDict[Hashable, tuple[np.ndarray, ...]] = OrderedDict()

  def encoder_moved(self, encoder: Any) -> None:
    """Says that the encoder in use is this one now, with the same weights."""
    self._encoder = encoder

  def look_up(
    self,
    prompts: Sequence[str],
    encode: Callable[..., Condition],
    *,
    tokenizer: text.Tokenizer,
    encoder: Any,
    complex_human_instruction: Sequence[str] | None,
    max_sequence_length: int,
    lowercase: bool,
    batch_size: int | None,
  ) -> Condition:
    """Returns one row a prompt; encodes those that are new.

    Args:
      encode: called with the encoder, `Tokens` of new prompts, `Prefixes`,
        batch_size and max_sequence_length.
      batch_size: how many at a time; None: all at once, filled up to a power of
        two so that few sizes are compiled.
      encoder: what was made with other weights is forgotten.
    """
    settings = (
      complex_human_instruction and tuple(complex_human_instruction),
      max_sequence_length,
      lowercase,
    )
    if not _is_same(encoder, self._encoder):
      self._rows.clear()
      self._prefixes.clear()
      self._encoder = encoder
    wanted = {prompt: (prompt, settings) for prompt in prompts}
    new = [p for p, key in wanted.items() if key not in self._rows]
    found = {p: self._rows[k] for p, k in wanted.items() if k in self._rows}
    tokenize = functools.partial(
      text.tokenize_prompts,
      tokenizer,
      complex_human_instruction=complex_human_instruction,
      max_sequence_length=max_sequence_length,
      lowercase=lowercase,
    )
    if found:
      tokenize(list(found))  # warns of what is cut off, like the first time
    if new:
      instruction = text.instruction_ids(tokenizer, complex_human_instruction)
      arrays = encode(
        encoder,
        Tokens(*tokenize(new), instruction),
        self._prefixes,
        batch_size=batch_size or 1 << (len(new) - 1).bit_length(),
        max_sequence_length=max_sequence_length,
      )
      found |= {p: tuple(a[i] for a in arrays) for i, p in enumerate(new)}
    for prompt, key in wanted.items():
      # A copy: a row must not keep the whole batch alive.
      self._rows.setdefault(key, tuple(a.copy() for a in found[prompt]))
      self._rows.move_to_end(key)
    while len(self._rows) > _CAPACITY:
      self._rows.popitem(last=False)
    rows = [found[prompt] for prompt in prompts]
    return Condition(*(np.stack(column) for column in zip(*rows, strict=True)))


def _is_same(encoder: Any, other: Any) -> bool:
  """Whether two encoders are made of the same arrays.

  Of shards that are gathered, the object is another each time.
  """
  leaves, structure = jax.tree.flatten(encoder)
  others, other_structure = jax.tree.flatten(other)
  return structure == other_structure and all(map(operator.is_, leaves, others))
