"""What a config file says of how a data set is used, as flags of the doctor."""

import inspect
import runpy
from typing import Any

from etils import epath

from sana_jax import config as config_lib
from sana_jax import resolution
from sana_jax.weights import opening


def of_config(file: str) -> dict[str, Any]:
  """Returns values of flags by name, from what a run of the file would take.

  Nothing is downloaded: parts of a published checkpoint are taken to have its
  pixels per token, and its tokenizer is left out.

  Args:
    file: with get_config(); what follows a colon is its argument, as of
      train.py.

  Raises:
    FileNotFoundError: there is no such file, or not the autoencoder it names.
    ValueError: it cannot be run, or its get_config() returns no run of text to
      image.
  """
  config = _read(file)
  values = {
    "image_size": config.data.image_size,
    "buckets": config.data.buckets or "square",
    "max_buckets": config.data.max_buckets,
    "min_clip_score": config.data.min_clip_score,
    "batch_size": config.batch_size,
    "max_sequence_length": config.max_sequence_length,
    "multiple": _compression(config) * config.model.patch_size,
  }
  tokenizer = config.tokenizer or _local(config, "tokenizer")
  return values | ({"tokenizer": tokenizer} if tokenizer else {})


def _read(file: str) -> config_lib.TextToImageConfig:
  path, _, argument = file.partition(":")
  try:
    get_config = runpy.run_path(path).get("get_config")
    if not inspect.isfunction(get_config):
      raise ValueError(f"--config={file}: {path} has no get_config().")
    if argument and not inspect.signature(get_config).parameters:
      raise ValueError(f"--config={file}: its get_config() takes no argument.")
    config = get_config(argument) if argument else get_config()
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f"--config={file}: {error}. Is this the directory of train.py?"
    ) from error
  if isinstance(config, config_lib.StagesConfig):
    raise ValueError(
      f"--config={file} has several runs: give the config of one, or its "
      "values as flags."
    )
  if not isinstance(config, config_lib.TextToImageConfig):
    raise ValueError(
      f"get_config() of --config={file} must return a TextToImageConfig, got "
      f"{type(config).__name__}."
    )
  return config


def _compression(config: config_lib.TextToImageConfig) -> int:
  """Returns the pixels per latent, along each side."""
  directory = config.autoencoder or _local(config, "vae")
  if directory is None:
    return resolution.COMPRESSION
  return opening.open_autoencoder(directory).config.spatial_compression


def _local(config: config_lib.TextToImageConfig, part: str) -> str | None:
  """Returns a part of `components`, if these are a directory that has it."""
  if config.components is None:
    return None
  directory = epath.Path(config.components) / part
  return str(directory) if directory.is_dir() else None
