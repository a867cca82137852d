"""Reads checkpoints of every kind into pipelines, and writes directories."""

import importlib.resources
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from sana_jax import config as config_lib
from sana_jax import sharding, text, tree
from sana_jax.diffusion import scheduler_config
from sana_jax.pipeline import sources, training_run
from sana_jax.pipeline.options import GenerationConfig
from sana_jax.weights import components as components_lib
from sana_jax.weights import files as weight_files
from sana_jax.weights import zoo

if TYPE_CHECKING:
  from sana_jax.pipeline.text_to_image import SanaPipeline

_FLOW_CLASS, _SPRINT_CLASS = "SanaPipeline", "SanaSprintPipeline"
_CONTROLNET_CLASS = "SanaControlNetPipeline"
_CLASSES = {
  "transformer": ["diffusers", "SanaTransformer2DModel"],
  "vae": ["diffusers", "AutoencoderDC"],
  "text_encoder": ["transformers", "Gemma2Model"],
  "tokenizer": ["transformers", "GemmaTokenizerFast"],
}
_BUNDLED = "emoji_model"
_INDEX = sources.INDEX
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
  path: epath.PathLike,
  *,
  dtype: Any,
  variant: str | None,
  mesh: jax.sharding.Mesh,
  components: epath.PathLike | None = None,
  step: int | None = None,
  fp16_clamp: bool | None = None,
) -> dict[str, Any]:
  """Reads everything a SanaPipeline is made of.

  Args:
    path: see `SanaPipeline.from_pretrained`, as the others.
    mesh: every device of it gets the models whole, straight from the files.

  Raises:
    FileNotFoundError: something is missing.
    ValueError: something is unreadable, unsupported, or does not fit.
  """
  source = sources.resolve(path, variant=variant)
  _check_applicable(source, variant, components, step)
  placed = {"dtype": dtype, "mesh": mesh}
  if isinstance(source, sources.TrainingRun):
    return training_run.load(
      source.path,
      step=step,
      components=components,
      fp16_clamp=fp16_clamp,
      **placed,
    )
  placed["rules"] = sharding.REPLICATED_RULES
  if isinstance(source, sources.TransformerWeights):
    return _load_transformer_with(
      source, components, fp16_clamp, variant, placed
    )
  return _load_directory(source, fp16_clamp, variant, placed)


def _load_directory(
  source: sources.Directory, fp16_clamp, variant, placed
) -> dict[str, Any]:
  path = source.path
  directories = [path / name for name in ("text_encoder", "transformer", "vae")]
  _check_variant(path, directories, variant)
  transformer, transformer_config = components_lib.load_transformer(
    path / "transformer",
    variant=variant_of(path / "transformer", variant),
    fp16_clamp=fp16_clamp,
    **placed,
  )
  parts = {}
  if (path / "controlnet").is_dir():
    parts["controlnet"], parts["controlnet_config"] = (
      components_lib.load_controlnet(
        path / "controlnet",
        variant=variant_of(path / "controlnet", variant),
        fp16_clamp=transformer.fp16_clamp,
        **placed,
      )
    )
  return (
    parts
    | _load_rest(path, variant, placed)
    | {
      "transformer": transformer,
      "transformer_config": transformer_config,
      "solver": _read_solver(path),
      "generation_config": _generation_config(
        path, source.entry, source.is_sprint
      ),
    }
  )


def _load_transformer_with(
  source: sources.TransformerWeights, components, fp16_clamp, variant, placed
) -> dict[str, Any]:
  """Puts a transformer among the other components of a directory."""
  path, entry = source.path, source.entry
  others = epath.Path(components)
  if not (others / _INDEX).is_file():
    raise FileNotFoundError(
      f"components={components} has no {_INDEX}; expected the directory of a "
      "checkpoint in the layout of diffusers."
    )
  directories = [others / "text_encoder", others / "vae"]
  _check_variant(
    path, [*directories, path] if path.is_dir() else directories, variant
  )
  config, solver = None, _read_solver(others)
  if entry is not None and path.is_file():
    # The file's own name is the surer sign: a teacher of SANA-Sprint has the
    # shapes of SANA-1.5.
    if not (path.parent / "config.json").is_file():
      config = entry.make_config()
    solver = entry.original_solver
  transformer, config = components_lib.load_transformer(
    path,
    config=config,
    variant=variant_of(path, variant) if path.is_dir() else None,
    fp16_clamp=fp16_clamp,
    **placed,
  )
  is_sprint = sources.read_class(others / _INDEX)
  return _load_rest(others, variant, placed) | {
    "transformer": transformer,
    "transformer_config": config,
    "solver": solver,
    "generation_config": _generation_config(others, entry, is_sprint),
  }


def _load_rest(
  path: epath.Path, variant, placed, *, with_text: bool = True
) -> dict[str, Any]:
  """Loads what belongs to no transformer in particular."""
  parts = {}
  loaders = [("autoencoder", "vae", components_lib.load_autoencoder)]
  if with_text:
    loaders.append(
      ("text_encoder", "text_encoder", components_lib.load_text_encoder)
    )
  for name, directory, load_one in loaders:
    parts[name], parts[f"{name}_config"] = load_one(
      path / directory,
      variant=variant_of(path / directory, variant),
      **placed,
    )
  if with_text:
    parts["tokenizer"] = text.Tokenizer.from_pretrained(str(path / "tokenizer"))
    parts["tokenizer_directory"] = path / "tokenizer"
  return parts


def load_encoders(
  path: epath.PathLike,
  *,
  dtype: Any,
  variant: str | None,
  mesh: jax.sharding.Mesh,
  with_text: bool = True,
) -> tuple[epath.Path, dict[str, Any]]:
  """Reads a checkpoint without its transformer, and its generation_config.

  Args:
    path: a directory in the layout of diffusers, or the name of a published
      checkpoint; see `load` for the others.
    with_text: False: without text encoder and tokenizer.

  Returns:
    The checkpoint's directory, and the parts by their names in SanaPipeline.

  Raises:
    FileNotFoundError: something is missing.
    ValueError: something is unreadable, unsupported, or a transformer alone.
  """
  source = sources.resolve(path, variant=variant)
  if not isinstance(source, sources.Directory):
    raise ValueError(
      f"{source.path} has no vae/ and text_encoder/: give the directory of a "
      "checkpoint in the layout of diffusers, such as the export/ of a "
      "training run."
    )
  names = ("vae", "text_encoder") if with_text else ("vae",)
  _check_variant(source.path, [source.path / n for n in names], variant)
  placed = {"dtype": dtype, "mesh": mesh, "rules": sharding.REPLICATED_RULES}
  parts = _load_rest(source.path, variant, placed, with_text=with_text)
  parts["generation_config"] = _generation_config(
    source.path, source.entry, source.is_sprint
  )
  return source.path, parts


def _read_solver(path: epath.Path) -> scheduler_config.Solver:
  return scheduler_config.from_config(weight_files.read_json(path / _SCHEDULER))


def save(path: epath.PathLike, pipeline: "SanaPipeline") -> None:
  """Writes a directory that `load` and diffusers read.

  Raises:
    ValueError: the pipeline does not know its tokenizer's files, has adapters
      attached, or its ControlNet is wired otherwise than diffusers does.
  """
  if pipeline.controlnet is not None and (
    pipeline.controlnet_wiring != "diffusers"
  ):
    raise ValueError(
      f"The ControlNet is wired {pipeline.controlnet_wiring!r}, which this "
      "layout cannot say: it would be read as wired for diffusers. Save its "
      "weights with components.save_controlnet."
    )
  names = tree.leaf_names(pipeline.transformer)
  if any(name.endswith("/down") for name in names):
    raise ValueError(
      "The transformer has LoRA adapters attached, which this layout cannot "
      "hold: use lora.fuse, or save the adapters with lora.save."
    )
  if pipeline.tokenizer_directory is None:
    raise ValueError(
      "The pipeline has no tokenizer_directory, so that its tokenizer cannot "
      "be saved; set pipeline.tokenizer_directory."
    )
  path = epath.Path(path)
  path.mkdir(parents=True, exist_ok=True)
  components_lib.save_text_encoder(
    path / "text_encoder", pipeline.text_encoder, pipeline.text_encoder_config
  )
  components_lib.save_transformer(
    path / "transformer", pipeline.transformer, pipeline.transformer_config
  )
  components_lib.save_autoencoder(
    path / "vae", pipeline.autoencoder, pipeline.autoencoder_config
  )
  classes, name = _CLASSES, _FLOW_CLASS
  if pipeline.is_sprint:
    name = _SPRINT_CLASS
  if pipeline.controlnet is not None:
    name = _CONTROLNET_CLASS
    classes = classes | {"controlnet": ["diffusers", "SanaControlNetModel"]}
    components_lib.save_controlnet(
      path / "controlnet", pipeline.controlnet, pipeline.controlnet_config
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
      "_class_name": name,
      "scheduler": ["diffusers", scheduler["_class_name"]],
      **classes,
    },
  )


def _check_applicable(source: sources.Source, variant, components, step):
  """Refuses arguments that this kind of checkpoint has no use for."""
  problems = []
  if isinstance(source, sources.TransformerWeights) and components is None:
    raise ValueError(
      f"{source.path} holds a transformer only; pass components=, the "
      "directory of a checkpoint in the layout of diffusers, for the text "
      "encoder, tokenizer and autoencoder."
    )
  if isinstance(source, sources.Directory) and components is not None:
    problems.append("components= is for a transformer alone and for runs")
  if not isinstance(source, sources.TrainingRun) and step is not None:
    problems.append("step= is for work directories of train.py")
  if isinstance(source, sources.TrainingRun) and variant is not None:
    problems.append("variant= is for published checkpoints")
  if problems:
    raise ValueError(f"{source.path}: {'; '.join(problems)}.")


def variant_of(directory: epath.Path, variant: str | None) -> str | None:
  """Returns the variant if the component has it, else None."""
  return variant if variant in weight_files.variants(directory) else None


def _check_variant(path, directories, variant: str | None) -> None:
  found = set().union(*(weight_files.variants(d) for d in directories))
  if variant is not None and variant not in found:
    raise FileNotFoundError(
      f"No component of {path} has weights of variant {variant!r}, only "
      f"{sorted(v or 'no variant' for v in found)}."
    )


def _generation_config(
  path: epath.Path, entry: zoo.Entry | None, is_sprint: bool
) -> GenerationConfig:
  """Takes the checkpoint's own, or what is published, or its kind's."""
  file = path / _GENERATION_CONFIG
  if entry is not None and not file.is_file():
    layers = None if entry.pag_block is None else (entry.pag_block,)
    return GenerationConfig(
      num_inference_steps=entry.num_inference_steps,
      guidance_scale=entry.guidance_scale,
      pag_applied_layers=layers,
    )
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
