"""Values of settings from JSON, tables and command lines, checked by type."""

import collections.abc
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from sana_jax.bulk import inputs
from sana_jax.pipeline import options

# What a line may say of its images besides the fields of GenerationConfig.
REQUEST_TYPES: Mapping[str, Any] = types.MappingProxyType(
  {
    "prompt": str,
    "negative_prompt": str,
    "seed": int,
    "image_index": int,
    "num_images_per_prompt": int,
    **dict.fromkeys(inputs.NAMES, str),
  }
)
SETTING_TYPES: Mapping[str, Any] = types.MappingProxyType(
  typing.get_type_hints(options.GenerationConfig)
)
_NAMES = {
  bool: "true or false",
  int: "a whole number",
  float: "a number",
  str: "a text",
}


def convert(value: Any, kind: Any) -> Any:
  """Returns a parsed JSON value as what the annotation `kind` says.

  Raises:
    ValueError: it is something else.
  """
  if type(value) is kind:  # nearly always, and a million lines take long
    return value
  if value is None and is_optional(kind):
    return None
  kind = _required(kind)
  items = _item_types(kind)
  if items is not None:
    return _convert_items(value, kind, items)
  if isinstance(value, kind) and not _is_stray_bool(value, kind):
    return value
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if kind is int and isinstance(value, float) and value.is_integer():
    return int(value)
  raise ValueError(f"expected {_describe(kind)}, got {value!r}")


def parse(text: str, kind: Any) -> Any:
  """Returns the value of a table's cell or a flag; "none" where None may be.

  Several numbers are separated by commas, several texts by line breaks.

  Raises:
    ValueError: it cannot be read as `kind`.
  """
  if _required(kind) is str:
    return text
  if text.strip().lower() == "none" and is_optional(kind):
    return None
  items = _item_types(_required(kind))
  if items is not None and items[0] is str:
    return convert(text.splitlines(), kind)
  source = text.strip().lower()
  if items is not None:
    source = f"[{source.strip('[]()')}]"
  try:
    return convert(json.loads(source), kind)
  except ValueError as error:  # names the text that was given, not its parts
    raise ValueError(
      f"expected {_describe(_required(kind))}, got {text!r}"
    ) from error


def from_flags(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the fields of GenerationConfig that flags change.

  Args:
    values: by name; None: not given; texts are parsed.

  Raises:
    ValueError: names the flag that cannot be read.
  """
  changes = {}
  for name, value in values.items():
    if isinstance(value, str):
      try:
        value = parse(value, SETTING_TYPES[name])
      except ValueError as error:
        raise ValueError(f"--{name}: {error}.") from error
    if value is not None:
      changes[name] = value
  return changes


def is_optional(kind: Any) -> bool:
  """Says whether None is among what the annotation allows."""
  return type(None) in typing.get_args(kind)


def _convert_items(value: Any, kind: Any, items: tuple[Any, ...]) -> tuple:
  fixed = items[-1] is not ...
  if not isinstance(value, list | tuple) or (
    fixed and len(value) != len(items)
  ):
    raise ValueError(f"expected {_describe(kind)}, got {value!r}")
  kinds = items if fixed else items[:1] * len(value)
  return tuple(
    convert(item, item_kind)
    for item, item_kind in zip(value, kinds, strict=True)
  )


def _describe(kind: Any) -> str:
  items = _item_types(kind)
  if items is None:
    return _NAMES[kind]
  item = _NAMES[items[0]].removeprefix("a ")
  if items[-1] is ...:
    return f"a list of {item}s"
  return f"{len(items)} {item}s"


def _item_types(kind: Any) -> tuple[Any, ...] | None:
  """Returns the types of a sequence's items, `...` last for any number."""
  origin, items = typing.get_origin(kind), typing.get_args(kind)
  if origin is tuple:
    return items
  if origin is collections.abc.Sequence:
    return (*items, ...)
  return None


def _required(kind: Any) -> Any:
  """Takes `| None` off an annotation."""
  if not is_optional(kind):
    return kind
  (rest,) = (k for k in typing.get_args(kind) if k is not type(None))
  return rest


def _is_stray_bool(value: Any, kind: Any) -> bool:
  # In Python True is an int.
  return isinstance(value, bool) and kind is not bool
