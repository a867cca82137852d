"""The base of all configs: typo-proof, freezable, convertible to JSON."""

import dataclasses
import json
import typing
from typing import Any

from sana_jax.config import near


class Config:
  """Base of all configs: typo-proof, freezable, convertible to a dict."""

  _frozen = False

  def __setattr__(self, name: str, value: Any) -> None:
    if self._frozen:
      raise AttributeError(
        f"{type(self).__name__}.{name} cannot be set: the config is frozen."
      )
    if name not in self.__dataclass_fields__:
      names = self.__dataclass_fields__
      raise AttributeError(
        f"{type(self).__name__} has no field {name!r}."
        f"{near.question(near.find(name, names))} "
        f"It has: {', '.join(names)}."
      )
    object.__setattr__(self, name, value)

  def freeze(self) -> None:
    """Checks the values and forbids further changes, nested configs too."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, Config):
          item.freeze()
    self.validate()
    object.__setattr__(self, "_frozen", True)

  def validate(self) -> None:
    """Raises ValueError when values do not fit together."""

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def to_json(self) -> str:
    return json.dumps(self.to_dict(), indent=2)


def from_dict(cls: type, values: dict[str, Any], *, strict: bool = False):
  """Builds a config from a plain dict such as a parsed `config.json`.

  Configs in fields, and in tuples of them, are built from the dicts there.

  Args:
    strict: False ignores unknown keys and fills missing ones with defaults,
      as published files of several generations need; True raises on unknown
      keys.

  Raises:
    ValueError: an unknown key in strict mode.
  """
  types = {field.name: field.type for field in dataclasses.fields(cls)}
  unknown = sorted(set(values) - set(types))
  if strict and unknown:
    raise ValueError(f"{cls.__name__} has no fields {unknown}.")

  def build(kind: Any, value: Any) -> Any:
    if isinstance(kind, type) and issubclass(kind, Config):
      return from_dict(kind, value, strict=strict)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
      return tuple(build(typing.get_args(kind)[0], item) for item in value)
    return _tuples(value)

  return cls(**{k: build(types[k], v) for k, v in values.items() if k in types})


def _tuples(value: Any) -> Any:
  """Turns (nested) lists into tuples: configs compare and hash by value."""
  if isinstance(value, list | tuple):
    return tuple(_tuples(item) for item in value)
  return value


def require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)
