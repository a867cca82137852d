"""The flag --config of commands, and what is said of a file it cannot take."""

import functools
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from absl import app, flags
from ml_collections import config_flags
from ml_collections.config_flags import config_path

from sana_jax import config as config_lib
from sana_jax.config import near

# In --helpfull, the flag is of the command that defines it.
flags.disclaim_key_flags()


class _FileError(Exception):
  """A config file cannot be read; the message is for users."""


class _Parser(flags.ArgumentParser):
  """Reads PATH, or PATH:ARGUMENT of get_config(), by the parser of a flag.

  Attributes:
    config: what was read last; None: nothing yet.
  """

  def __init__(self, inner: flags.ArgumentParser):
    self._inner = inner
    self.config: Any = None

  def flag_type(self) -> str:
    return self._inner.flag_type()

  def parse(self, path: str) -> Any:
    file, _, argument = path.partition(":")
    if not os.path.isfile(file):
      others = map(str, pathlib.Path(file).parent.glob("*.py"))
      meant = near.question(near.find(file, others))
      raise _FileError(f"there is no file {file!r}.{meant}")
    try:
      config = self._inner.parse(path)
      # Where get_config() raised an OSError, any access raises another.
      getattr(config, "seed", None)
    except OSError as error:
      raise _FileError(f"{file}: {error.__cause__}") from error
    except (TypeError, ValueError) as error:
      # What is raised again has the traceback in its message.
      raised = error.__context__
      text = _sentence(raised, file, argument)
      raise _FileError(text) from raised
    self.config = config
    return config


def _sentence(error: BaseException, file: str, argument: str) -> str:
  # Of the call of get_config() itself, and of what that called.
  frames = traceback.extract_tb(error.__traceback__)
  if isinstance(error, ValueError):
    return f"{file}: {error}"
  if len(frames) > 1:
    return f"{file}, line {_line(frames, file)}: {error}"
  if argument:
    return (
      f"{file} has no presets: leave out what follows the colon "
      f"({argument!r}), and set --config.mesh.fsdp=N and its like."
    )
  return f"{file} wants a preset, as in {file}:v5e-256 ({error})."


def _line(frames: traceback.StackSummary, file: str) -> int:
  lines = [frame.lineno for frame in frames if frame.filename == file]
  return lines[-1] if lines else frames[-1].lineno


def define() -> flags.FlagHolder:
  """Defines --config, of which fields are set as in --config.batch_size=8."""
  holder = config_flags.DEFINE_config_file(
    "config", None, "File with get_config(); fields: --config.batch_size=8."
  )
  flag = flags.FLAGS["config"]
  flag.parser = _Parser(flag.parser)
  return holder


def parser(command: str) -> Callable[[list[str]], list[str]]:
  """Returns what parses flags, and exits with one line on a wrong --config.

  Args:
    command: that the line begins with.
  """
  return functools.partial(_parse, command)


def _parse(command: str, argv: list[str]) -> list[str]:
  try:
    return app.parse_flags_with_usage(argv)
  except (
    LookupError,
    AttributeError,
    ValueError,
    OSError,
    _FileError,
  ) as error:
    text = _misspelt(flags.FLAGS["config"].parser.config, argv)
    if text is None:
      # Of a KeyError, str() is the representation of its message.
      text = error.args[0] if isinstance(error, KeyError) else str(error)
    return sys.exit(f"{command}: --config: {' '.join(text.split())}")


def _misspelt(config: Any, argv: list[str]) -> str | None:
  """Says which field that a flag sets there is not; None: there are all."""
  if not isinstance(config, config_lib.Config):
    return None
  values = config.to_dict()
  names = list(_names(values))
  for name in _set_fields(argv):
    if not _has(values, name):
      meant = near.question(near.find(name, names))
      return f"{type(config).__name__} has no field {name!r}.{meant}"
  return None


def _set_fields(argv: list[str]) -> list[str]:
  """Returns the names of fields that flags set: "optim.peak_lr"."""
  argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
  found = (re.match(r"--?(?:no)?config\.([^=]*)", arg) for arg in argv)
  return [match[1] for match in found if match is not None]


def _has(values: Any, name: str) -> bool:
  try:
    functools.reduce(
      lambda holder, key: holder[key], config_path.split(name), values
    )
  except (LookupError, TypeError, ValueError):
    return False
  return True


def _names(values: Any, prefix: str = "") -> Iterator[str]:
  """Names all that nested dicts hold: "optim" and "optim.peak_lr"."""
  if isinstance(values, dict):
    for key, value in values.items():
      yield f"{prefix}{key}"
      yield from _names(value, f"{prefix}{key}.")
