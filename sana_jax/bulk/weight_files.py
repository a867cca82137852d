"""Which weights a run reads: other files make other images."""

import hashlib
from collections.abc import Iterable
from typing import Any

from etils import epath

from sana_jax import config as config_lib
from sana_jax.bulk import loading as loading_lib
from sana_jax.pipeline import sources
from sana_jax.weights import files, lora_files, orbax_files

_HASH_CHUNK = 1 << 24


def hashes(
  source: sources.Source, loading: loading_lib.Loading
) -> dict[str, Any]:
  """Returns the SHA-256 of all that loading reads.

  "checkpoint_sha256" is that of the checkpoint's weight files one after the
  other (of a training run, those of the step), then those of what it takes from
  elsewhere. Where there are any, "controlnet_sha256" and "lora_sha256", one for
  each adapter.

  Raises:
    FileNotFoundError: there are no weights.
  """
  found: dict[str, Any] = {"checkpoint_sha256": _hash(of(source, loading))}
  if loading.controlnet is not None:
    path = sources.resolve_controlnet(loading.controlnet)
    found["controlnet_sha256"] = _hash(_component(path, None))
  if loading.lora:
    found["lora_sha256"] = [adapter_hash(path) for path in loading.lora]
  return found


def adapter_hash(path: epath.PathLike) -> str:
  """Returns the SHA-256 of an adapter's files."""
  return _hash(lora_files.files_of(path))


def of(
  source: sources.Source, loading: loading_lib.Loading
) -> list[epath.Path]:
  """Lists the files of a checkpoint that loading reads.

  Raises:
    FileNotFoundError: there are none.
  """
  path, others = source.path, loading.components
  if isinstance(source, sources.TrainingRun):
    return _of_training_run(path, loading)
  if isinstance(source, sources.TransformerWeights):
    found = _component(path, loading.variant)
    if others is not None:
      found += _components(
        epath.Path(others), ("text_encoder", "vae"), loading.variant
      )
    return found
  names = ["text_encoder", "transformer", "vae"]
  if (path / "controlnet").is_dir():
    names.insert(0, "controlnet")
  return _components(path, names, loading.variant)


def _of_training_run(
  path: epath.Path, loading: loading_lib.Loading
) -> list[epath.Path]:
  """Lists the files of a step, and of the models that were not trained."""
  step = loading.step
  if step is None:
    step = max(
      int(entry.name)
      for entry in (path / "checkpoints").iterdir()
      if entry.name.isdigit()
    )
  found = _all_files(path / "checkpoints" / str(step))
  config = config_lib.from_dict(
    config_lib.TextToImageConfig,
    files.read_json(path / "config.json"),
    strict=True,
  )
  named = {"vae": config.autoencoder}
  if not config.train_text_encoder:
    named["text_encoder"] = config.text_encoder_path
  for name, place in named.items():
    if loading.components is not None:
      place = epath.Path(loading.components) / name
    found += _component(epath.Path(place), None)
  return found


def _components(
  path: epath.Path, names: Iterable[str], variant: str | None
) -> list[epath.Path]:
  return [file for name in names for file in _component(path / name, variant)]


def _component(path: epath.Path, variant: str | None) -> list[epath.Path]:
  """Lists the weight files of one component, a directory or a file."""
  if orbax_files.holds_params(path):
    return _all_files(path / "params")
  if not path.is_dir():
    return [path]
  # A variant that this component does not have: its usual weights are read.
  has_variant = variant in files.variants(path)
  return files.weight_files(path, variant=variant if has_variant else None)


def _all_files(directory: epath.Path) -> list[epath.Path]:
  found: list[epath.Path] = []
  for entry in sorted(directory.iterdir()):
    found += _all_files(entry) if entry.is_dir() else [entry]
  if not found:
    raise FileNotFoundError(f"{directory} is empty; expected saved parameters.")
  return found


def _hash(paths: Iterable[epath.Path]) -> str:
  digest = hashlib.sha256()
  for path in paths:
    with path.open("rb") as file:
      while chunk := file.read(_HASH_CHUNK):
        digest.update(chunk)
  return digest.hexdigest()
