"""Keeps compiled programs from one run to the next, to start sooner."""

import pathlib
from collections.abc import Mapping

import jax
from absl import flags

# In --helpfull, the flag is of the command that defines it.
flags.disclaim_key_flags()


def default_directory(environment: Mapping[str, str]) -> pathlib.Path:
  """Returns the user's cache directory, as the XDG convention has it.

  Args:
    environment: variables, such as os.environ.
  """
  base = environment.get("XDG_CACHE_HOME", "")
  # Relative ones are to be ignored.
  if pathlib.Path(base).is_absolute():
    return pathlib.Path(base) / "sana_jax"
  return pathlib.Path.home() / ".cache" / "sana_jax"


def define_flag() -> flags.FlagHolder[str | None]:
  """Defines --compilation_cache_dir, the first argument of `enable`."""
  return flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    "Keeps compiled programs; None: in the user's cache directory, empty: off.",
  )


def enable(directory: str | None, environment: Mapping[str, str]) -> None:
  """Turns JAX's persistent compilation cache on.

  Args:
    directory: empty: off; None: what JAX is set to already (by
      JAX_COMPILATION_CACHE_DIR, say), else `default_directory`.
  """
  if directory is None:
    if jax.config.jax_compilation_cache_dir is not None:
      return
    directory = str(default_directory(environment))
  jax.config.update("jax_compilation_cache_dir", directory or None)
