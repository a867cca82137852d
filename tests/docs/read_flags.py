"""Lets programs read their flags, and do nothing else.

Its input is a JSON list of [program, *arguments]; its output a list of what
each program said against them, None for nothing.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import runpy
import sys

from absl import app

# What the programs import, for them all. Flags are theirs alone.
_COMMON = (
  *("sana_jax.training.text_to_image", "sana_jax.training.stages"),
  *("sana_jax.plan.report", "sana_jax.bulk.runner", "sana_jax.bulk.loading"),
)


class _ReadError(Exception):
  """The flags are read: this ends the program."""


def read(command: list[str]) -> str | None:
  """Runs a program until its flags are read; returns what it said."""
  said = io.StringIO()
  program, *sys.argv[1:] = command
  sys.argv[0] = program

  def run(main, argv=None, flags_parser=app.parse_flags_with_usage):
    del main, argv
    flags_parser(sys.argv)
    raise _ReadError

  parse_args = argparse.ArgumentParser.parse_args

  def parse(*args, **kwargs):
    parse_args(*args, **kwargs)
    raise _ReadError

  app.run, argparse.ArgumentParser.parse_args = run, parse
  is_script = program.endswith(".py")
  start = runpy.run_path if is_script else runpy.run_module
  sys.path.insert(0, "")
  with contextlib.redirect_stderr(said):
    try:
      start(program, run_name="__main__")
    except _ReadError:
      return None
    except ModuleNotFoundError as error:
      return None if error.name == "apache_beam" else str(error)
    except SystemExit as error:
      return f"{error.code} {said.getvalue()}"
  return "it did not read any flags"


def main() -> None:
  for name in _COMMON:
    importlib.import_module(name)
  # Each in a process of its own: they define the same flags.
  context = multiprocessing.get_context("fork")
  with context.Pool(2, maxtasksperchild=1) as pool:
    said = pool.map(read, json.load(sys.stdin), chunksize=1)
  sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
  main()
