"""A work directory of train.py, read as a pipeline."""

import dataclasses
from typing import Any

import jax
from etils import epath
from flax import nnx

from sana_jax import checkpoint, sharding, text
from sana_jax import config as config_lib
from sana_jax.diffusion import schedules
from sana_jax.models import gemma2, sana
from sana_jax.pipeline import options, sources
from sana_jax.weights import components as components_lib
from sana_jax.weights import files


def generation_config(
  config: config_lib.TextToImageConfig,
) -> options.GenerationConfig:
  """What the trained model is sampled with, in training and afterwards."""
  return options.GenerationConfig(
    num_inference_steps=config.sample_steps,
    guidance_scale=config.sample_guidance_scale,
    max_sequence_length=config.max_sequence_length,
    complex_human_instruction=(
      text.default_instruction()
      if config.use_complex_human_instruction
      else None
    ),
    null_mask=config.flow.null_mask,
  )


def located(
  config: config_lib.TextToImageConfig,
) -> config_lib.TextToImageConfig:
  """Returns the config with the directories of what is not trained.

  What it takes from `components` is downloaded if that is a name.

  Raises:
    FileNotFoundError: `components` is not to be had, or lacks one of them.
    ValueError: it is no whole checkpoint.
  """
  wanted = {
    "autoencoder": "vae",
    "tokenizer": "tokenizer",
    "text_encoder_path": "text_encoder",
  }
  if config.train_text_encoder:
    del wanted["text_encoder_path"]
  wanted = {k: v for k, v in wanted.items() if not getattr(config, k)}
  if config.components is None or not wanted:
    return config
  found = sources.resolve(config.components, components=wanted.values())
  if not isinstance(found, sources.Directory):
    raise ValueError(
      f"components ({config.components}) must have a model_index.json and "
      f"{', '.join(f'{name}/' for name in wanted.values())}, as a directory "
      "in the layout of diffusers; of a work directory, name its export/."
    )
  places = {name: found.path / part for name, part in wanted.items()}
  missing = {k: path for k, path in places.items() if not path.is_dir()}
  if missing:
    raise FileNotFoundError(
      f"components ({config.components}) lacks "
      f"{', '.join(map(str, missing.values()))}; set {', '.join(missing)} to "
      "directories that there are."
    )
  return dataclasses.replace(config, **{k: str(v) for k, v in places.items()})


def load(
  workdir: epath.Path,
  *,
  step: int | None,
  components: epath.PathLike | None,
  dtype: Any,
  mesh: jax.sharding.Mesh,
  fp16_clamp: bool | None,
) -> dict[str, Any]:
  """Reads the averaged parameters of a step, and what was not trained.

  Of a run that keeps no average, the parameters themselves.

  Args:
    step: None: the newest that is kept.
    components: directory whose vae/, tokenizer/ and text_encoder/ are used in
      place of those that the run's config names.

  Raises:
    FileNotFoundError: no such step, or a path in the config is not there.
    ValueError: the run trained something else.
  """
  config = read_config(workdir)
  if components is None:
    config = located(config)
  paths = _component_paths(workdir, config, components)
  placed = {"dtype": dtype, "mesh": mesh, "rules": sharding.REPLICATED_RULES}
  clamp = config.fp16_clamp if fp16_clamp is None else fp16_clamp
  params = _restore(config, workdir, step, dtype, mesh, clamp)
  if not config.train_text_encoder:
    params["text_encoder"], _ = components_lib.load_text_encoder(
      paths["text_encoder"], **placed
    )
  autoencoder, autoencoder_config = components_lib.load_autoencoder(
    paths["vae"], **placed
  )
  return params | {
    "text_encoder_config": config.text_encoder,
    "transformer_config": config.model,
    "autoencoder": autoencoder,
    "autoencoder_config": autoencoder_config,
    "tokenizer": text.Tokenizer.from_pretrained(str(paths["tokenizer"])),
    "tokenizer_directory": paths["tokenizer"],
    "solver": schedules.FlowDPMSolver(flow_shift=config.flow.shift),
    "generation_config": generation_config(config),
  }


def read_config(workdir: epath.Path) -> config_lib.TextToImageConfig:
  """Reads the config of a run.

  Raises:
    ValueError: the run trained something else.
  """
  path = workdir / "config.json"
  try:
    return config_lib.from_dict(
      config_lib.TextToImageConfig, files.read_json(path), strict=True
    )
  except ValueError as error:
    raise ValueError(
      f"{path} is not that of a text-to-image run ({error}); an autoencoder's "
      "run has its result in export/vae."
    ) from error


def _component_paths(
  workdir: epath.Path,
  config: config_lib.TextToImageConfig,
  components: epath.PathLike | None,
) -> dict[str, epath.Path]:
  named = {
    "vae": config.autoencoder,
    "tokenizer": config.tokenizer,
    "text_encoder": config.text_encoder_path,
  }
  if config.train_text_encoder:
    del named["text_encoder"]
  if components is not None:
    named = {name: epath.Path(components) / name for name in named}
  paths = {name: epath.Path(path) for name, path in named.items()}
  missing = [str(path) for path in paths.values() if not path.exists()]
  if missing:
    raise FileNotFoundError(
      f"The run in {workdir} needs {', '.join(missing)}, not found from here; "
      "call from the directory where train.py ran, or pass components=, a "
      "directory with vae/, tokenizer/ and text_encoder/."
    )
  return paths


def _restore(config, workdir, step, dtype, mesh, fp16_clamp) -> dict[str, Any]:
  build = {"dtype": dtype, "param_dtype": dtype}
  models = {
    "transformer": jax.eval_shape(
      lambda: sana.SanaTransformer.from_config(
        config.model, fp16_clamp=fp16_clamp, rngs=nnx.Rngs(0), **build
      )
    )
  }
  if config.train_text_encoder:
    models["text_encoder"] = jax.eval_shape(
      lambda: gemma2.Gemma2.from_config(
        config.text_encoder, rngs=nnx.Rngs(0), **build
      )
    )
  whole = sharding.replicated(mesh)
  abstract = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=whole),
    models,
  )
  return checkpoint.restore_average(workdir, abstract, step=step)
