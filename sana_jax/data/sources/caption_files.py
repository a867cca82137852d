"""Captions and their scores as files, columns and fields hold them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sana_jax.data import captions as captions_lib
from sana_jax.data import records

_NAMES = ("prompt", "caption", "captions", "text", "texts", "description")


def is_caption_name(name: str) -> bool:
  """Returns whether a field among others is a caption, to judge by its name.

  prompt, caption(s), text(s), description; names that end with _caption(s) or
  _prompt, or begin with caption_ or with the reference's single underscore
  (_InternVL2-26B). Negative prompts are none.
  """
  name = name.lower()
  if name.startswith(("negative", "__")):
    return False
  return (
    name in _NAMES
    or name.endswith(("_caption", "_captions", "_prompt"))
    or name.startswith(("caption_", "_"))
  )


def from_text(content: bytes, where: str) -> str:
  """Returns a .txt file as one line.

  Raises:
    ValueError: it is not UTF-8.
  """
  try:
    text = content.decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{where} is not UTF-8 ({error}): expected a caption as plain text."
    ) from error
  return " ".join(line for line in map(str.strip, text.splitlines()) if line)


def parse_json(content: bytes, where: str) -> Mapping[str, Any]:
  """Reads a JSON object.

  Raises:
    ValueError: it is something else.
  """
  try:
    value = json.loads(content.decode("utf-8-sig"))
  except ValueError as error:
    raise ValueError(
      f"{where} is not JSON ({error}): expected captions by name."
    ) from error
  if not isinstance(value, Mapping):
    raise ValueError(
      f"{where} holds a JSON {type(value).__name__}: expected an object of "
      "captions by name."
    )
  return value


def from_json(
  value: Mapping[str, Any], stem: str, suffix: str = ""
) -> dict[str, str]:
  """Returns the captions of one picture by name.

  Args:
    value: {"prompt": ...} with other fields, or {stem: {name: text}}, in which
      all texts are captions.
    suffix: what the file's name has beyond the picture's: a nested "prompt" of
      such a file is called by it, as the reference does.
  """
  if isinstance(value.get(stem), Mapping):
    fields, all_texts = value[stem], True
  else:
    fields, all_texts = value, False
  if suffix and "prompt" in fields:
    name = suffix.replace(".", "_")
    return dict(_texts(name, fields["prompt"]))
  return dict(
    pair
    for name, text in fields.items()
    if all_texts or is_caption_name(name)
    for pair in _texts(name, text)
  )


def _texts(name: str, value: Any) -> Iterable[tuple[str, str]]:
  if value is None:
    yield name, ""
  elif isinstance(value, str):
    yield name, value.strip()
  elif isinstance(value, Sequence) and all(isinstance(t, str) for t in value):
    yield from (
      (name if len(value) == 1 else f"{name}_{i}", text.strip())
      for i, text in enumerate(value)
    )


def from_fields(fields: Mapping[str, Any]) -> dict[str, str]:
  """Returns captions of columns already known to hold them; lists are split."""
  return dict(
    pair for name, value in fields.items() for pair in _texts(name, value)
  )


def scores_from_json(
  value: Mapping[str, Any], stem: str, where: str
) -> dict[str, float]:
  """Returns the scores of one picture's captions by name.

  Args:
    value: {stem: {name: score}} or {name: score}; scores may be strings.

  Raises:
    ValueError: a score is not a finite number.
  """
  if isinstance(value.get(stem), Mapping):
    value = value[stem]
  elif any(isinstance(scores, Mapping) for scores in value.values()):
    return {}  # Of other pictures.
  scores = {}
  for name, score in value.items():
    try:
      number = float(score)
    except (TypeError, ValueError):
      number = math.nan
    if not math.isfinite(number):
      raise ValueError(
        f"{where} gives {name!r} of {stem!r} the score {score!r}: expected a "
        "finite number."
      )
    scores[name] = number
  return scores


def assemble(
  texts: Mapping[str, str],
  scores: Mapping[str, float] | None = None,
  text: str | None = None,
) -> tuple[records.Caption, ...]:
  """Makes captions, the one called "prompt" first.

  Args:
    texts: by name.
    text: of the .txt file. It is the prompt, unless there is another one; then
      it is called "text".
  """
  named = dict(texts)
  if text is not None and text != named.get(captions_lib.PROMPT):
    free = captions_lib.PROMPT if captions_lib.PROMPT not in named else "text"
    named = {free: text, **named}
  order = sorted(named, key=lambda name: name != captions_lib.PROMPT)
  scores = scores or {}
  return tuple(
    records.Caption(name, named[name], scores.get(name)) for name in order
  )
