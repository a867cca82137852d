"""The flag --config of commands, and what is said of a file it cannot take."""

import functools
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, flags
from ml_collections import config_flags

# In --helpfull, the flag is of the command that defines it.
flags.disclaim_key_flags()


class _FileError(Exception):
  """A config file cannot be read; the message is for users."""


class _Parser(flags.ArgumentParser):
  """Reads PATH, or PATH:ARGUMENT of get_config(), by the parser of a flag."""

  def __init__(self, inner: flags.ArgumentParser):
    self._inner = inner

  def flag_type(self) -> str:
    return self._inner.flag_type()

  def parse(self, path: str) -> Any:
    file, _, argument = path.partition(":")
    if not os.path.isfile(file):
      raise _FileError(f"there is no file {file!r}.")
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
  except (KeyError, AttributeError, OSError, _FileError) as error:
    # Of a KeyError, str() is the representation of its message.
    text = error.args[0] if isinstance(error, KeyError) else str(error)
    if " " not in text:
      text = f"there is no field or key {text!r}."
    return sys.exit(f"{command}: --config: {' '.join(text.split())}")
