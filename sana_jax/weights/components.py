"""Loads and saves one component of a checkpoint: transformer, VAE or text."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.models import controlnet, dc_ae, gemma2, sana
from sana_jax.weights import controlnet as controlnet_weights
from sana_jax.weights import dc_ae as dc_ae_weights
from sana_jax.weights import files, mapping, opening, precision
from sana_jax.weights import gemma2 as gemma2_weights
from sana_jax.weights import sana as sana_weights


def load_transformer(
  path: epath.PathLike,
  *,
  config: config_lib.SanaConfig | None = None,
  variant: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  rules: sharding.Rules = sharding.RULES,
  fp16_clamp: bool | None = None,
  scan: bool = True,
  remat: str = "none",
) -> tuple[sana.SanaTransformer, config_lib.SanaConfig]:
  """Loads a diffusion transformer, in any layout of `opening.Component`.

  Args:
    path: a component directory, of safetensors or Orbax parameters, or a
      `.safetensors` or `.pth` file.
    config: None reads config.json in the directory or beside the file; if there
      is none, a file in the original layout is recognised by its shapes (a
      SANA-Sprint teacher looks like SANA-1.5 and needs its config).
    variant: see `files.weight_files`.
    dtype: of the computation.
    param_dtype: of the parameters; None is `dtype`.
    mesh: the devices to spread the parameters over, each of which gets its
      part straight from the file; None: the default device has them whole.
    rules: which axes of the parameters are cut along which of the mesh's;
      `sharding.REPLICATED_RULES` puts a copy on every device.
    fp16_clamp: for weights trained in float16, see `precision`; None decides
      by name, architecture and files, and logs why.
    scan: see `sana.SanaTransformer`, as `remat`.

  Raises:
    FileNotFoundError: something is missing.
    ValueError: the contents are unreadable, do not fit, or are ambiguous.
  """
  component = opening.open_transformer(
    path, config=config, variant=variant, scan=scan, remat=remat
  )
  clamp = precision.choose_clamp(
    trained_in_fp16(epath.Path(path), component), fp16_clamp
  )
  build = functools.partial(component.build, fp16_clamp=clamp)
  component = component._replace(build=build)
  model = component.load(dtype, param_dtype, mesh=mesh, rules=rules)
  return model, component.config


def trained_in_fp16(
  path: epath.Path, component: opening.Component
) -> precision.Decision:
  """Decides by the names, the architecture and the files of a transformer."""
  has_variants = path.is_dir() and component.layout != "orbax"
  return precision.trained_in_fp16(
    component.config,
    names=(str(path), str(path.parent), str(path.parent.parent)),
    variants=files.variants(path) if has_variants else (),
    dtypes={tensor.dtype for tensor in component.tensors.values()},
  )


def load_controlnet(
  path: epath.PathLike,
  *,
  config: config_lib.SanaControlNetConfig | None = None,
  variant: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  rules: sharding.Rules = sharding.RULES,
  fp16_clamp: bool = False,
  scan: bool = True,
  remat: str = "none",
) -> tuple[controlnet.SanaControlNet, config_lib.SanaControlNetConfig]:
  """Loads a control branch, in any layout of `opening.Component`.

  Args and errors are those of `load_transformer`, whose `fp16_clamp` goes for
  its control branch too. An original file may hold the transformer as well,
  which `load_transformer` reads from it.
  """
  component = opening.open_controlnet(
    path,
    config=config,
    variant=variant,
    fp16_clamp=fp16_clamp,
    scan=scan,
    remat=remat,
  )
  model = component.load(dtype, param_dtype, mesh=mesh, rules=rules)
  return model, component.config


def load_autoencoder(
  path: epath.PathLike,
  *,
  config: config_lib.DCAEConfig | None = None,
  variant: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  rules: sharding.Rules = sharding.RULES,
) -> tuple[dc_ae.DCAE, config_lib.DCAEConfig]:
  """Loads a DC-AE, in any layout of `opening.Component`.

  Args and errors are those of `load_transformer`; a file in the original layout
  without a config is taken to be DC-AE f32c32, the one SANA uses.
  """
  component = opening.open_autoencoder(path, config=config, variant=variant)
  model = component.load(dtype, param_dtype, mesh=mesh, rules=rules)
  return model, component.config


def load_text_encoder(
  path: epath.PathLike,
  *,
  config: config_lib.Gemma2Config | None = None,
  variant: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  mesh: jax.sharding.Mesh | None = None,
  rules: sharding.Rules = sharding.RULES,
) -> tuple[gemma2.Gemma2, config_lib.Gemma2Config]:
  """Loads Gemma 2, as the bare decoder or as a causal language model.

  Args and errors are those of `load_transformer`.
  """
  component = opening.open_text_encoder(path, config=config, variant=variant)
  model = component.load(dtype, param_dtype, mesh=mesh, rules=rules)
  return model, component.config


def save_transformer(
  directory: epath.PathLike,
  model: sana.SanaTransformer,
  config: config_lib.SanaConfig,
) -> None:
  """Writes a `transformer/` directory that diffusers reads too."""
  files.write_component(
    directory,
    opening.config_json(config),
    mapping.published(model, sana_weights.diffusers_rules(config)),
  )


def save_controlnet(
  directory: epath.PathLike,
  model: controlnet.SanaControlNet,
  config: config_lib.SanaControlNetConfig,
) -> None:
  """Writes a `controlnet/` directory that diffusers reads too."""
  files.write_component(
    directory,
    opening.config_json(config),
    mapping.published(model, controlnet_weights.diffusers_rules(config)),
  )


def save_autoencoder(
  directory: epath.PathLike, model: dc_ae.DCAE, config: config_lib.DCAEConfig
) -> None:
  """Writes a `vae/` directory that diffusers reads too."""
  files.write_component(
    directory,
    opening.config_json(config),
    mapping.published(model, dc_ae_weights.diffusers_rules(config)),
  )


def save_text_encoder(
  directory: epath.PathLike,
  model: gemma2.Gemma2,
  config: config_lib.Gemma2Config,
) -> None:
  """Writes a `text_encoder/` directory that transformers reads too."""
  files.write_component(
    directory,
    opening.config_json(config),
    mapping.published(model, gemma2_weights.diffusers_rules(config)),
    stem="model",
  )
