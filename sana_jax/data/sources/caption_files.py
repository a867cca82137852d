"""Captions and their scores as files, columns and fields hold them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sana_jax.data import captions as captions_lib
from sana_jax.data import records

_NAMES = ("prompt", "caption", "captions", "text", "texts", "description")
_ENDINGS = ("_caption", "_captions", "_prompt")
SCORE = "clip_score"
_SHOWN = 60


def is_caption_name(name: str) -> bool:
  """Returns whether a field among others is a caption, to judge by its name.

  prompt, caption(s), text(s), description; names that end with _caption(s) or
  _prompt, or begin with caption_ or with the reference's single underscore
  (_InternVL2-26B). Negative prompts and scores are none.
  """
  name = name.lower()
  if name.startswith(("negative", "__")) or name.endswith(SCORE):
    return False
  return _is_surely_caption(name) or name.startswith(("caption_", "_"))


def _is_surely_caption(name: str) -> bool:
  """Returns whether a field of this name must hold texts."""
  return name.lower() in _NAMES or name.lower().endswith(_ENDINGS)


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
  value: Mapping[str, Any], stem: str, where: str, suffix: str = ""
) -> dict[str, str]:
  """Returns the captions of one picture by name.

  Args:
    where: what messages call the file.
    value: {"prompt": ...} with other fields, or {stem: {name: text}}, in which
      all texts are captions.
    suffix: what the file's name has beyond the picture's: a nested "prompt" of
      such a file is called by it, as the reference does.

  Raises:
    ValueError: a caption is neither a text nor a list of texts.
  """
  if isinstance(value.get(stem), Mapping):
    fields, all_texts = value[stem], True
  else:
    fields, all_texts = value, False
  if suffix and "prompt" in fields:
    name = suffix.replace(".", "_")
    return dict(_split(name, _texts("prompt", fields["prompt"], where)))
  return from_fields(
    {
      name: text
      for name, text in fields.items()
      if (all_texts or is_caption_name(name))
      # Of other fields, some are texts about the picture and some are not.
      and (_is_surely_caption(name) or _is_text(text))
    },
    where,
  )


def from_fields(fields: Mapping[str, Any], where: str) -> dict[str, str]:
  """Returns captions of fields known to hold them; lists are split.

  Raises:
    ValueError: a field is neither a text nor a list of texts.
  """
  return dict(
    pair
    for name, value in fields.items()
    for pair in _split(name, _texts(name, value, where))
  )


def _is_text(value: Any) -> bool:
  if isinstance(value, list):
    return all(text is None or isinstance(text, str) for text in value)
  return value is None or isinstance(value, str)


def _texts(name: str, value: Any, where: str) -> list[str]:
  if not _is_text(value):
    raise ValueError(
      f"{where} gives the caption {name!r} as {_short(value)}: expected a "
      "text or a list of texts."
    )
  values = value if isinstance(value, list) else [value]
  return [(text or "").strip() for text in values]


def _split(name: str, values: Sequence[Any]) -> Iterable[tuple[str, Any]]:
  """Yields the values of a field by the names of the captions it becomes."""
  for i, value in enumerate(values):
    yield (name if len(values) == 1 else f"{name}_{i}"), value


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False, default=str)
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def is_score_name(name: str, captions: Iterable[str]) -> bool:
  """Returns whether a field holds scores of these captions; see `scores_of`."""
  return name == SCORE or name.removesuffix(f"_{SCORE}") in captions


def scores_of(fields: Mapping[str, Any], where: str) -> dict[str, float]:
  """Returns scores that stand beside captions, by the captions' names.

  NAME_clip_score is about the caption NAME, clip_score about "prompt", or the
  first caption where none is called so. Of a list of captions, a list has the
  scores one by one; one number is that of all. Without a number (None, NaN)
  there is no score.

  Raises:
    ValueError: a score is not a number, or a list has another length.
  """
  captions = {
    name: value
    for name, value in fields.items()
    if is_caption_name(name) and _is_text(value)
  }
  main = (
    captions_lib.PROMPT
    if captions_lib.PROMPT in captions
    else next(iter(captions), None)
  )
  scores: dict[str, float] = {}
  for name, value in captions.items():
    given = fields.get(f"{name}_{SCORE}")
    if given is None and name == main:
      given = fields.get(SCORE)
    if given is None:
      continue
    count = len(value) if isinstance(value, list) else 1
    each = given if isinstance(given, list) else [given] * count
    if len(each) != count:
      raise ValueError(
        f"{where} has {count} captions {name!r} and {len(each)} scores: "
        "expected one for each."
      )
    for caption, score in _split(name, each):
      number = _number(score)
      if number is None:
        raise ValueError(
          f"{where} gives {caption!r} the score {score!r}: expected a number."
        )
      if math.isfinite(number):
        scores[caption] = number
  return scores


def _number(score: Any) -> float | None:
  try:
    return math.nan if score is None else float(score)
  except (TypeError, ValueError):
    return None


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
    number = _number(score)
    if number is None or not math.isfinite(number):
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
