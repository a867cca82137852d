"""Trains what a config describes: train.py --config=configs/x.py --workdir=DIR.

Running the same command again continues from the last checkpoint.
"""

import logging as std_logging
import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sana_jax import config as config_lib
from sana_jax.training import autoencoder, loop, text_to_image

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "File with get_config(); fields: --config.batch_size=8."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory for checkpoints, metrics, samples and the export."
)
_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Directory that keeps compiled programs."
)
flags.mark_flags_as_required(["config", "workdir"])

_RECIPES = {
  config_lib.TextToImageConfig: text_to_image.make_recipe,
  config_lib.AutoencoderConfig: autoencoder.make_recipe,
}


def _quiet_orbax() -> None:
  """Keeps Orbax's many lines about every save out of the training log."""
  handler = logging.get_absl_handler()
  handler.addFilter(
    lambda record: (
      "orbax" not in record.pathname or record.levelno >= std_logging.WARNING
    )
  )


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  if _CACHE.value:
    jax.config.update("jax_compilation_cache_dir", _CACHE.value)
  _quiet_orbax()
  config = _CONFIG.value
  logging.info(
    "%s on %d %s device(s)",
    type(config).__name__,
    jax.device_count(),
    jax.default_backend(),
  )
  try:
    config.freeze()
    recipe = _RECIPES[type(config)](config)
    loop.train(config, _WORKDIR.value, recipe)
  except (ValueError, FileNotFoundError, FloatingPointError) as error:
    logging.error("%s", error)
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
