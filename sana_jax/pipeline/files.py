"""Checkpoint directories: model_index.json and one directory per component."""

import importlib.resources
from typing import TYPE_CHECKING, Any

from etils import epath

from sana_jax import config as config_lib
from sana_jax import text
from sana_jax.diffusion import scheduler_config
from sana_jax.pipeline.options import GenerationConfig
from sana_jax.weights import components
from sana_jax.weights import files as weight_files

if TYPE_CHECKING:
  from sana_jax.pipeline.text_to_image import SanaPipeline

_FLOW_CLASS, _SPRINT_CLASS = "SanaPipeline", "SanaSprintPipeline"
_CLASSES = {
  "transformer": ["diffusers", "SanaTransformer2DModel"],
  "vae": ["diffusers", "AutoencoderDC"],
  "text_encoder": ["transformers", "Gemma2Model"],
  "tokenizer": ["transformers", "GemmaTokenizerFast"],
}
_BUNDLED = "emoji_model"
_INDEX = "model_index.json"
_GENERATION_CONFIG = "generation_config.json"
_SCHEDULER = "scheduler/scheduler_config.json"


def bundled_checkpoint() -> epath.Path:
  """Returns the directory of the emoji model that comes with the package.

  Raises:
    FileNotFoundError: this installation was made without it.
  """
  path = epath.Path(importlib.resources.files("sana_jax.assets") / _BUNDLED)
  if not (path / _INDEX).is_file():
    raise FileNotFoundError(
      f"This installation has no bundled model ({path}); give the directory "
      "of a checkpoint."
    )
  return path


def load(
  path: epath.PathLike, *, dtype: Any, variant: str | None
) -> dict[str, Any]:
  """Reads everything a SanaPipeline is made of.

  Raises:
    FileNotFoundError: something is missing.
    ValueError: something is unreadable, unsupported, or does not fit.
  """
  path = epath.Path(path)
  is_sprint = _check_index(path)
  directories = [path / name for name in ("text_encoder", "transformer", "vae")]
  _check_variant(path, directories, variant)
  loaders = (
    components.load_text_encoder,
    components.load_transformer,
    components.load_autoencoder,
  )
  loaded = {}
  names = ("text_encoder", "transformer", "autoencoder")
  for name, directory, load_one in zip(
    names, directories, loaders, strict=True
  ):
    has_variant = variant in weight_files.variants(directory)
    loaded[name], loaded[f"{name}_config"] = load_one(
      directory, variant=variant if has_variant else None, dtype=dtype
    )
  return loaded | {
    "tokenizer": text.Tokenizer.from_pretrained(str(path / "tokenizer")),
    "tokenizer_directory": path / "tokenizer",
    "solver": scheduler_config.from_config(
      weight_files.read_json(path / _SCHEDULER)
    ),
    "generation_config": _generation_config(path, is_sprint),
  }


def save(path: epath.PathLike, pipeline: "SanaPipeline") -> None:
  """Writes a directory that `load` and diffusers read.

  Raises:
    ValueError: the pipeline does not know its tokenizer's files.
  """
  if pipeline.tokenizer_directory is None:
    raise ValueError(
      "The pipeline has no tokenizer_directory, so that its tokenizer cannot "
      "be saved; set pipeline.tokenizer_directory."
    )
  path = epath.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  components.save_text_encoder(
    path / "text_encoder", pipeline.text_encoder, pipeline.text_encoder_config
  )
  components.save_transformer(
    path / "transformer", pipeline.transformer, pipeline.transformer_config
  )
  components.save_autoencoder(
    path / "vae", pipeline.autoencoder, pipeline.autoencoder_config
  )
  (path / "tokenizer").mkdir(exist_ok=True)
  for file in epath.Path(pipeline.tokenizer_directory).iterdir():
    target = path / "tokenizer" / file.name
    if file.is_file() and file != target:
      file.copy(target, overwrite=True)
  scheduler = scheduler_config.to_config(pipeline.solver)
  (path / "scheduler").mkdir(exist_ok=True)
  weight_files.write_json(path / _SCHEDULER, scheduler)
  weight_files.write_json(
    path / _GENERATION_CONFIG, pipeline.generation_config.to_dict()
  )
  weight_files.write_json(
    path / _INDEX,
    {
      "_class_name": _SPRINT_CLASS if pipeline.is_sprint else _FLOW_CLASS,
      "scheduler": ["diffusers", scheduler["_class_name"]],
      **_CLASSES,
    },
  )


def _check_index(path: epath.Path) -> bool:
  """Returns whether the directory holds a SANA-Sprint checkpoint."""
  if not path.is_dir():
    raise FileNotFoundError(
      f"{path} is not a directory; download the checkpoint first and pass the "
      "directory that holds its model_index.json."
    )
  if not (path / _INDEX).is_file():
    raise FileNotFoundError(
      f"{path} has no {_INDEX}; expected a checkpoint in the layout of "
      "diffusers."
    )
  found = weight_files.read_json(path / _INDEX).get("_class_name")
  if found not in (_FLOW_CLASS, _SPRINT_CLASS):
    raise ValueError(
      f"{path / _INDEX} describes a {found}; supported are {_FLOW_CLASS} and "
      f"{_SPRINT_CLASS}."
    )
  return found == _SPRINT_CLASS


def _check_variant(path, directories, variant: str | None) -> None:
  found = set().union(*(weight_files.variants(d) for d in directories))
  if variant is not None and variant not in found:
    raise FileNotFoundError(
      f"No component of {path} has weights of variant {variant!r}, only "
      f"{sorted(v or 'no variant' for v in found)}."
    )


def _generation_config(path: epath.Path, is_sprint: bool) -> GenerationConfig:
  file = path / _GENERATION_CONFIG
  if not file.is_file():
    return GenerationConfig.sprint() if is_sprint else GenerationConfig()
  try:
    config = config_lib.from_dict(
      GenerationConfig, weight_files.read_json(file), strict=True
    )
    config.validate()
  except ValueError as error:
    raise ValueError(f"{file}: {error}") from error
  return config
