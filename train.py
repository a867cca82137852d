"""Trains what a config describes: train.py --config=configs/x.py --workdir=DIR.

Running the same command again continues from the last checkpoint. On SIGTERM a
checkpoint is saved first.
"""

import logging as std_logging
import os
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sana_jax import compilation_cache, sharding
from sana_jax import config as config_lib
from sana_jax.training import autoencoder, loop, text_to_image

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "File with get_config(); fields: --config.batch_size=8."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory for checkpoints, metrics, samples and the export."
)
_CACHE = flags.DEFINE_string(
  "compilation_cache_dir",
  None,
  "Keeps compiled programs; None: in the user's cache directory, empty: off.",
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  False,
  "Join the other processes of a TPU pod, Slurm job or Open MPI run; the "
  "command is the same for all.",
)
flags.mark_flags_as_required(["config", "workdir"])

_RECIPES = {
  config_lib.TextToImageConfig: text_to_image.make_recipe,
  config_lib.AutoencoderConfig: lambda config, _: autoencoder.make_recipe(
    config
  ),
}


def _quiet_orbax() -> None:
  """Keeps Orbax's many lines about every save out of the training log."""
  handler = logging.get_absl_handler()
  handler.addFilter(
    lambda record: (
      "orbax" not in record.pathname or record.levelno >= std_logging.WARNING
    )
  )


def _parse_flags(argv: list[str]) -> list[str]:
  """Parses the flags, and makes one line of what a config file gets wrong."""
  try:
    return app.parse_flags_with_usage(argv)
  except (KeyError, AttributeError, OSError) as error:
    # Of a KeyError, str() is the representation of its message.
    text = error.args[0] if isinstance(error, KeyError) else str(error)
    return sys.exit(f"train.py: --config: {' '.join(text.split())}")


def _make_recipe(config: config_lib.Config, workdir: str) -> loop.Recipe:
  if type(config) not in _RECIPES:
    # Where the file could not be read, any access raises an OSError saying why.
    getattr(config, "seed", None)
    raise ValueError(
      f"get_config() of --config must return one of "
      f"{', '.join(cls.__name__ for cls in _RECIPES)}, got "
      f"{type(config).__name__}."
    )
  config.freeze()
  # Before any work: a mesh that does not fit the devices is an error.
  sharding.make_mesh(config.mesh)
  return _RECIPES[type(config)](config, workdir)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  compilation_cache.enable(_CACHE.value, os.environ)
  if _DISTRIBUTED.value:
    jax.distributed.initialize()
  _quiet_orbax()
  config = _CONFIG.value
  logging.info(
    "%s on %d %s device(s)",
    type(config).__name__,
    jax.device_count(),
    jax.default_backend(),
  )
  try:
    recipe = _make_recipe(config, _WORKDIR.value)
    loop.train(config, _WORKDIR.value, recipe)
  except (ValueError, OSError, FloatingPointError) as error:
    logging.error("%s", " ".join(str(error).split()))
    logging.debug("raised here (--verbosity=1 shows it)", exc_info=True)
    sys.exit(1)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
