"""Loads and saves one component of a checkpoint: transformer, VAE or text."""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.models import controlnet, dc_ae, gemma2, sana
from sana_jax.weights import controlnet as controlnet_weights
from sana_jax.weights import dc_ae as dc_ae_weights
from sana_jax.weights import files, mapping, torch_zip
from sana_jax.weights import gemma2 as gemma2_weights
from sana_jax.weights import sana as sana_weights

_TRANSFORMER_CLASS = "SanaTransformer2DModel"
_CONTROLNET_CLASS = "SanaControlNetModel"
_AUTOENCODER_CLASS = "AutoencoderDC"
_TEXT_ENCODER_CLASS = "Gemma2Model"
# Settings of Gemma 2 that are fixed here and that transformers wants to read.
_GEMMA2_FIXED = {
  "architectures": [_TEXT_ENCODER_CLASS],
  "attention_bias": False,
  "hidden_activation": "gelu_pytorch_tanh",
  "model_type": "gemma2",
}


def load_transformer(
  path: epath.PathLike,
  *,
  config: config_lib.SanaConfig | None = None,
  variant: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  scan: bool = True,
  remat: str = "none",
) -> tuple[sana.SanaTransformer, config_lib.SanaConfig]:
  """Loads a diffusion transformer in the diffusers or the original layout.

  Args:
    path: a component directory, or a `.safetensors` or `.pth` file.
    config: None reads config.json in the directory or beside the file; if there
      is none, a file in the original layout is recognised by its shapes (a
      SANA-Sprint teacher looks like SANA-1.5 and needs its config).
    variant: see `files.weight_files`.
    dtype: of the computation.
    param_dtype: of the parameters; None is `dtype`.
    scan: see `sana.SanaTransformer`, as `remat`.

  Raises:
    FileNotFoundError: something is missing.
    ValueError: the contents are unreadable, do not fit, or are ambiguous.
  """
  tensors = _open(path, variant)
  tensors = {
    name.removeprefix("model.diffusion_model."): tensor
    for name, tensor in tensors.items()
  }
  original = any(name.startswith("blocks.") for name in tensors)
  if config is None:
    values = _read_config(path, _TRANSFORMER_CLASS)
    if values is not None:
      config = config_lib.from_dict(config_lib.SanaConfig, values)
    elif original:
      config = infer_transformer_config(tensors, source=str(path))
    else:
      raise _no_config(path)
  rules = sana_weights.original_rules if original else None
  build = functools.partial(
    sana.SanaTransformer.from_config, config, scan=scan, remat=remat
  )
  model = _fill(
    build,
    (rules or sana_weights.diffusers_rules)(config),
    tensors,
    dtype=dtype,
    param_dtype=param_dtype,
    ignore=sana_weights.ORIGINAL_IGNORED if original else (),
    source=str(path),
  )
  return model, config


def load_controlnet(
  path: epath.PathLike,
  *,
  config: config_lib.SanaControlNetConfig | None = None,
  variant: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
  scan: bool = True,
  remat: str = "none",
) -> tuple[controlnet.SanaControlNet, config_lib.SanaControlNetConfig]:
  """Loads a control branch in the diffusers or the original layout.

  Args and errors are those of `load_transformer`. An original file may hold the
  transformer too, which `load_transformer` reads from it.
  """
  tensors = _open(path, variant)
  original = any(name.startswith("controlnet.") for name in tensors)
  if config is None:
    values = _read_config(path, None if original else _CONTROLNET_CLASS)
    if original and values is not None:
      # It may be that of the transformer, which is in the same file.
      values = (
        values if values.get("_class_name") == _CONTROLNET_CLASS else None
      )
    if values is not None:
      config = config_lib.from_dict(config_lib.SanaControlNetConfig, values)
    elif original:
      config = infer_controlnet_config(tensors, source=str(path))
    else:
      raise _no_config(path)
  rules = (
    controlnet_weights.original_rules
    if original
    else controlnet_weights.diffusers_rules
  )
  model = _fill(
    functools.partial(
      controlnet.SanaControlNet.from_config, config, scan=scan, remat=remat
    ),
    rules(config),
    tensors,
    dtype=dtype,
    param_dtype=param_dtype,
    ignore=controlnet_weights.ORIGINAL_IGNORED if original else (),
    source=str(path),
  )
  return model, config


def load_autoencoder(
  path: epath.PathLike,
  *,
  config: config_lib.DCAEConfig | None = None,
  variant: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
) -> tuple[dc_ae.DCAE, config_lib.DCAEConfig]:
  """Loads a DC-AE in the diffusers or the original layout.

  Args and errors are those of `load_transformer`; a file in the original layout
  without a config is taken to be DC-AE f32c32, the one SANA uses.
  """
  tensors = _open(path, variant)
  original = any(".stages." in name for name in tensors)
  if config is None:
    values = _read_config(path, _AUTOENCODER_CLASS)
    if values is not None:
      config = config_lib.from_dict(config_lib.DCAEConfig, values)
    elif original:
      config = config_lib.DCAEConfig()
    else:
      raise _no_config(path)
  rules = (
    dc_ae_weights.original_rules if original else dc_ae_weights.diffusers_rules
  )
  model = _fill(
    functools.partial(dc_ae.DCAE.from_config, config),
    rules(config),
    tensors,
    dtype=dtype,
    param_dtype=param_dtype,
    ignore=dc_ae_weights.IGNORED,
    source=str(path),
  )
  return model, config


def load_text_encoder(
  path: epath.PathLike,
  *,
  config: config_lib.Gemma2Config | None = None,
  variant: str | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = None,
) -> tuple[gemma2.Gemma2, config_lib.Gemma2Config]:
  """Loads Gemma 2, as the bare decoder or as a causal language model.

  Args and errors are those of `load_transformer`.
  """
  tensors = gemma2_weights.strip_prefix(_open(path, variant))
  if config is None:
    values = _read_config(path, None)
    if values is None:
      raise _no_config(path)
    config = gemma2_weights.gemma2_config(values)
  model = _fill(
    functools.partial(gemma2.Gemma2.from_config, config),
    gemma2_weights.diffusers_rules(config),
    tensors,
    dtype=dtype,
    param_dtype=param_dtype,
    ignore=(),
    source=str(path),
  )
  return model, config


def save_transformer(
  directory: epath.PathLike,
  model: sana.SanaTransformer,
  config: config_lib.SanaConfig,
) -> None:
  """Writes a `transformer/` directory that diffusers reads too."""
  files.write_component(
    directory,
    {"_class_name": _TRANSFORMER_CLASS, **config.to_dict()},
    mapping.save(model, sana_weights.diffusers_rules(config)),
  )


def save_controlnet(
  directory: epath.PathLike,
  model: controlnet.SanaControlNet,
  config: config_lib.SanaControlNetConfig,
) -> None:
  """Writes a `controlnet/` directory that diffusers reads too."""
  files.write_component(
    directory,
    {"_class_name": _CONTROLNET_CLASS, **config.to_dict()},
    mapping.save(model, controlnet_weights.diffusers_rules(config)),
  )


def save_autoencoder(
  directory: epath.PathLike, model: dc_ae.DCAE, config: config_lib.DCAEConfig
) -> None:
  """Writes a `vae/` directory that diffusers reads too."""
  files.write_component(
    directory,
    {"_class_name": _AUTOENCODER_CLASS, **config.to_dict()},
    mapping.save(model, dc_ae_weights.diffusers_rules(config)),
  )


def save_text_encoder(
  directory: epath.PathLike,
  model: gemma2.Gemma2,
  config: config_lib.Gemma2Config,
) -> None:
  """Writes a `text_encoder/` directory that transformers reads too."""
  values = {k: v for k, v in config.to_dict().items() if v is not None}
  files.write_component(
    directory,
    {**_GEMMA2_FIXED, **values},
    mapping.save(model, gemma2_weights.diffusers_rules(config)),
    stem="model",
  )


def infer_transformer_config(
  tensors: files.Tensors, *, source: str = "checkpoint"
) -> config_lib.SanaConfig:
  """Recognises a published architecture by the shapes of an original file.

  Raises:
    ValueError: not one of the published widths, or no positional embedding
      that would tell the training resolution.
  """
  presets = {
    preset.width: preset
    for preset in (config_lib.sana_600m(), config_lib.sana_1600m())
  }
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  width = shapes.get("x_embedder.proj.weight", (None,))[0]
  grid = shapes.get("pos_embed", (0, 0))[1]
  side = math.isqrt(grid)
  if width not in presets or not grid or side**2 != grid:
    raise ValueError(
      f"The architecture of {source} cannot be told from its shapes (width "
      f"{width}, pos_embed {shapes.get('pos_embed')}); pass config=..., or put "
      "a config.json beside it."
    )
  config = presets[width]
  blocks = {re.match(r"blocks\.(\d+)\.", name) for name in shapes} - {None}
  config.num_layers = len({match[1] for match in blocks})
  config.sample_size = side
  # Only the 2K and 4K models use their positional embedding.
  config.interpolation_scale = {64: 1.0, 128: 2.0}.get(side)
  if "blocks.0.attn.q_norm.weight" in shapes:
    config.qk_norm = "rms_norm_across_heads"
  config.guidance_embeds = "cfg_embedder.mlp.0.weight" in shapes
  return config


def infer_controlnet_config(
  tensors: files.Tensors, *, source: str = "checkpoint"
) -> config_lib.SanaControlNetConfig:
  """Recognises a published architecture by the shapes of an original file.

  Raises:
    ValueError: not one of the published widths.
  """
  presets = {
    preset.width: preset
    for preset in (config_lib.sana_600m(), config_lib.sana_1600m())
  }
  patches = tensors.get("x_embedder.proj.weight")
  width = None if patches is None else patches.shape[0]
  if width not in presets:
    raise ValueError(
      f"The architecture of the ControlNet in {source} cannot be told from its "
      f"width {width}, expected one of {sorted(presets)}; pass config=..."
    )
  config = config_lib.from_dict(
    config_lib.SanaControlNetConfig, presets[width].to_dict()
  )
  blocks = {re.match(r"controlnet\.(\d+)\.", name) for name in tensors} - {None}
  config.num_layers = len({match[1] for match in blocks})
  return config


def _fill(
  build: Callable[..., Any],
  rules: Sequence[mapping.Rule],
  tensors: files.Tensors,
  *,
  dtype: Any,
  param_dtype: Any,
  ignore: Sequence[str],
  source: str,
) -> Any:
  if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
      f"dtype must be float32 or bfloat16, got {jnp.dtype(dtype).name}: the "
      "activations of these models overflow float16."
    )
  param_dtype = dtype if param_dtype is None else param_dtype
  abstract = jax.eval_shape(
    lambda: build(dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
  )
  return mapping.load(abstract, rules, tensors, ignore=ignore, source=source)


def _open(path: epath.PathLike, variant: str | None) -> files.Tensors:
  path = epath.Path(path)
  if path.is_dir():
    return files.open_component(path, variant=variant)
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} does not exist; expected a directory with config.json and "
      "safetensors weights, or a .safetensors or .pth file."
    )
  if path.suffix == ".safetensors":
    return files.open_safetensors(path)
  if path.suffix in (".pth", ".pt", ".bin"):
    return torch_zip.open_pth(path)
  raise ValueError(
    f"{path} has the suffix {path.suffix!r}; expected .safetensors or .pth."
  )


def _read_config(
  path: epath.PathLike, class_name: str | None
) -> dict[str, Any] | None:
  path = epath.Path(path)
  file = (path if path.is_dir() else path.parent) / "config.json"
  if not file.is_file() and not path.is_dir():
    return None
  values = files.read_json(file)
  found = values.get("_class_name", class_name)
  if found != class_name and class_name is not None:
    raise ValueError(f"{file} describes a {found}; expected a {class_name}.")
  return values


def _no_config(path: epath.PathLike) -> ValueError:
  return ValueError(
    f"{path} says nothing of its architecture; pass config=..., or put a "
    "config.json beside it."
  )
