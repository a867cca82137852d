"""Opens one component of a checkpoint: its config, layout, and tensors' names.

Nothing here reads the values of tensors.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from etils import epath
from flax import nnx

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.models import controlnet, dc_ae, gemma2, sana
from sana_jax.weights import (
  architecture,
  files,
  mapping,
  orbax_files,
  torch_zip,
)
from sana_jax.weights import controlnet as controlnet_weights
from sana_jax.weights import dc_ae as dc_ae_weights
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


class Component(NamedTuple):
  """One component's files, understood but not read.

  Attributes:
    kind: "transformer", "controlnet", "autoencoder" or "text_encoder".
    layout: "diffusers", "original" or "orbax".
    build: the model's constructor, given `dtype`, `param_dtype` and `rngs`.
    rules: from `tensors` to the model's parameters.
    ignored: regular expressions of tensors that are no parameters.
    source: names the files in error messages.
  """

  kind: str
  layout: str
  config: Any
  build: Callable[..., Any]
  rules: Sequence[mapping.Rule]
  tensors: files.Tensors
  ignored: Sequence[str]
  source: str

  def abstract(self, dtype: Any = jnp.float32, param_dtype: Any = None) -> Any:
    """Returns the model with shapes for parameters."""
    param_dtype = dtype if param_dtype is None else param_dtype
    return _abstract(self.build, dtype, param_dtype)

  def problems(self) -> list[str]:
    """Lists missing, unexpected and misshapen tensors."""
    return mapping.problems(
      self.abstract(), self.rules, self.tensors, ignore=self.ignored
    )

  def load(
    self,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: sharding.Rules = sharding.RULES,
  ) -> Any:
    """Reads the parameters, straight to where they belong.

    Args:
      mesh: the devices to spread them over by `rules`; None: the default
        device has them whole.

    Raises:
      ValueError: the tensors do not fit the model, or `dtype` is neither
        float32 nor bfloat16.
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
      raise ValueError(
        f"dtype must be float32 or bfloat16, got {jnp.dtype(dtype).name}: the "
        "activations of these models overflow float16."
      )
    abstract, shardings = self.abstract(dtype, param_dtype), None
    if mesh is not None:
      axes = _KINDS[type(self.config)].param_axes
      shardings = sharding.param_shardings(abstract, axes, mesh, rules)
    return mapping.load(
      abstract,
      self.rules,
      self.tensors,
      shardings=shardings,
      ignore=self.ignored,
      source=self.source,
    )


def component(
  config: config_lib.Config,
  tensors: files.Tensors,
  *,
  source: str = "checkpoint",
  **options: Any,
) -> Component:
  """Says how tensors, in whichever layout, make the model of a config.

  Args:
    options: of the model's `from_config`, such as `scan`.
  """
  kind = _KINDS[type(config)]
  build = functools.partial(kind.build, config, **options)
  layout = _layout(kind, tensors)
  return Component(
    kind.name,
    layout,
    config,
    build,
    _rules(kind, layout, config, build),
    tensors,
    kind.ignored.get(layout, ()),
    source,
  )


def open_transformer(
  path: epath.PathLike,
  *,
  config: config_lib.SanaConfig | None = None,
  variant: str | None = None,
  **options: Any,
) -> Component:
  """Opens what `load_transformer` loads; same arguments and errors."""
  tensors = {
    name.removeprefix("model.diffusion_model."): tensor
    for name, tensor in _open(path, variant).items()
  }
  if config is None:
    values = _read_config(path, _TRANSFORMER_CLASS)
    if values is not None:
      config = config_lib.from_dict(config_lib.SanaConfig, values)
    elif _layout(_KINDS[config_lib.SanaConfig], tensors) == "original":
      config = architecture.infer_transformer_config(tensors, source=str(path))
    else:
      raise _no_config(path)
  return component(config, tensors, source=str(path), **options)


def open_controlnet(
  path: epath.PathLike,
  *,
  config: config_lib.SanaControlNetConfig | None = None,
  variant: str | None = None,
  **options: Any,
) -> Component:
  """Opens what `load_controlnet` loads; same arguments and errors."""
  tensors = _open(path, variant)
  original = _layout(_KINDS[config_lib.SanaControlNetConfig], tensors)
  if config is None:
    # Beside an original file may be that of the transformer, which it holds.
    is_original = original == "original"
    values = _read_config(path, None if is_original else _CONTROLNET_CLASS)
    if values is not None and values.get("_class_name") == _CONTROLNET_CLASS:
      config = config_lib.from_dict(config_lib.SanaControlNetConfig, values)
    elif is_original:
      config = architecture.infer_controlnet_config(tensors, source=str(path))
    else:
      raise _no_config(path)
  return component(config, tensors, source=str(path), **options)


def open_autoencoder(
  path: epath.PathLike,
  *,
  config: config_lib.DCAEConfig | None = None,
  variant: str | None = None,
) -> Component:
  """Opens what `load_autoencoder` loads; same arguments and errors."""
  tensors = _open(path, variant)
  if config is None:
    values = _read_config(path, _AUTOENCODER_CLASS)
    if values is not None:
      config = config_lib.from_dict(config_lib.DCAEConfig, values)
    elif _layout(_KINDS[config_lib.DCAEConfig], tensors) == "original":
      config = config_lib.DCAEConfig()
    else:
      raise _no_config(path)
  return component(config, tensors, source=str(path))


def open_text_encoder(
  path: epath.PathLike,
  *,
  config: config_lib.Gemma2Config | None = None,
  variant: str | None = None,
) -> Component:
  """Opens what `load_text_encoder` loads; same arguments and errors."""
  tensors = gemma2_weights.strip_prefix(_open(path, variant))
  if config is None:
    values = _read_config(path, None)
    if values is None:
      raise _no_config(path)
    config = gemma2_weights.gemma2_config(values)
  return component(config, tensors, source=str(path))


def open_any(
  path: epath.PathLike,
  *,
  config_file: epath.PathLike | None = None,
  variant: str | None = None,
) -> Component:
  """Opens a component whose kind its config, or else its tensors, tell.

  Args:
    config_file: None reads config.json in the directory or beside the file.

  Raises:
    FileNotFoundError: something is missing.
    ValueError: neither tells the kind, or the contents are unreadable.
  """
  config = None
  if config_file is not None:
    config = _parse_config(files.read_json(config_file), config_file)
    kind = _KINDS[type(config)].name
  else:
    kind = _tell_kind(path, variant)
  openers = {
    "transformer": open_transformer,
    "controlnet": open_controlnet,
    "autoencoder": open_autoencoder,
    "text_encoder": open_text_encoder,
  }
  return openers[kind](path, config=config, variant=variant)


def rules_of(component: Component, layout: str) -> list[mapping.Rule]:
  """Returns a component's table for any layout; names as in `Component`.

  Raises:
    ValueError: there is no such layout of this kind.
  """
  kind = _KINDS[type(component.config)]
  return _rules(kind, layout, component.config, component.build)


def config_json(config: config_lib.Config) -> dict[str, Any]:
  """Returns the contents of a component's config.json."""
  values = config.to_dict()
  if isinstance(config, config_lib.Gemma2Config):
    values = {k: v for k, v in values.items() if v is not None}
    # transformers admits integers only.
    if float(config.query_pre_attn_scalar).is_integer():
      values["query_pre_attn_scalar"] = int(config.query_pre_attn_scalar)
  return {**_KINDS[type(config)].fixed, **values}


class _Kind(NamedTuple):
  """What `component` must know of one kind.

  Attributes:
    build: the model's `from_config`.
    original: names that only its original layout has.
    rules: by layout; Orbax's is the same for all.
    ignored: by layout.
    fixed: what config.json holds besides the config.
    param_axes: the model's sharding table.
  """

  name: str
  build: Callable[..., Any]
  original: re.Pattern[str]
  rules: dict[str, Callable[[Any], list[mapping.Rule]]]
  ignored: dict[str, Sequence[str]]
  fixed: dict[str, Any]
  param_axes: sharding.ParamAxes


_KINDS: dict[type, _Kind] = {
  config_lib.SanaConfig: _Kind(
    "transformer",
    sana.SanaTransformer.from_config,
    re.compile(r"blocks\."),
    {
      "diffusers": sana_weights.diffusers_rules,
      "original": sana_weights.original_rules,
    },
    {"original": sana_weights.ORIGINAL_IGNORED},
    {"_class_name": _TRANSFORMER_CLASS},
    sana.PARAM_AXES,
  ),
  config_lib.SanaControlNetConfig: _Kind(
    "controlnet",
    controlnet.SanaControlNet.from_config,
    re.compile(r"controlnet\."),
    {
      "diffusers": controlnet_weights.diffusers_rules,
      "original": controlnet_weights.original_rules,
    },
    {"original": controlnet_weights.ORIGINAL_IGNORED},
    {"_class_name": _CONTROLNET_CLASS},
    controlnet.PARAM_AXES,
  ),
  config_lib.DCAEConfig: _Kind(
    "autoencoder",
    dc_ae.DCAE.from_config,
    re.compile(r".*\.stages\."),
    {
      "diffusers": dc_ae_weights.diffusers_rules,
      "original": dc_ae_weights.original_rules,
    },
    dict.fromkeys(("diffusers", "original"), dc_ae_weights.IGNORED),
    {"_class_name": _AUTOENCODER_CLASS},
    dc_ae.PARAM_AXES,
  ),
  config_lib.Gemma2Config: _Kind(
    "text_encoder",
    gemma2.Gemma2.from_config,
    re.compile(r"(?!)"),  # There is only the one layout.
    {"diffusers": gemma2_weights.diffusers_rules},
    {},
    _GEMMA2_FIXED,
    gemma2.PARAM_AXES,
  ),
}


def _layout(kind: _Kind, tensors: files.Tensors) -> str:
  # Names of ours have slashes, published ones have dots.
  if any("/" in name for name in tensors):
    return "orbax"
  original = any(kind.original.match(name) for name in tensors)
  return "original" if original else "diffusers"


def _rules(
  kind: _Kind, layout: str, config: Any, build: Callable[..., Any]
) -> list[mapping.Rule]:
  if layout == "orbax":
    return mapping.own_rules(_abstract(build, jnp.float32, jnp.float32))
  if layout not in kind.rules:
    raise ValueError(
      f"There is no layout {layout!r} of a {kind.name}; there are "
      f"{[*kind.rules, 'orbax']}."
    )
  return kind.rules[layout](config)


def _abstract(build: Callable[..., Any], dtype: Any, param_dtype: Any) -> Any:
  return jax.eval_shape(
    lambda: build(dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0))
  )


def _parse_config(
  values: dict[str, Any], source: epath.PathLike
) -> config_lib.Config:
  if values.get("model_type") == _GEMMA2_FIXED["model_type"]:
    return gemma2_weights.gemma2_config(values)
  for cls, kind in _KINDS.items():
    name = kind.fixed.get("_class_name")
    if name is not None and values.get("_class_name") == name:
      return config_lib.from_dict(cls, values)
  raise ValueError(
    f"{source} describes a {values.get('_class_name')}; expected a "
    f"{_TRANSFORMER_CLASS}, an {_AUTOENCODER_CLASS} or a {_TEXT_ENCODER_CLASS}."
  )


def _tell_kind(path: epath.PathLike, variant: str | None) -> str:
  path = epath.Path(path)
  file = (path if path.is_dir() else path.parent) / "config.json"
  if file.is_file():
    return _KINDS[type(_parse_config(files.read_json(file), file))].name
  # Only files without a config are looked into; ours have one.
  for name in _open(path, variant):
    name = name.removeprefix("model.diffusion_model.")
    if re.match(r"(transformer_)?blocks\.\d+\.", name):
      return "transformer"
    if re.match(r"(encoder|decoder)\.", name):
      return "autoencoder"
    if re.match(r"(model\.)?layers\.\d+\.", name):
      return "text_encoder"
  raise ValueError(
    f"{path} holds neither a SANA transformer, nor a DC-AE, nor a Gemma 2; "
    "its tensors have other names."
  )


def _open(path: epath.PathLike, variant: str | None) -> files.Tensors:
  path = epath.Path(path)
  if orbax_files.holds_params(path):
    if variant is not None:
      raise ValueError(
        f"{path} holds Orbax parameters, which have no variants; got "
        f"variant={variant!r}."
      )
    return orbax_files.open_params(path)
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
