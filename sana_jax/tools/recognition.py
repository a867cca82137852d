"""What a path holds, from headers alone: dictionaries fit for JSON."""

import dataclasses
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from sana_jax import config as config_lib
from sana_jax.diffusion import scheduler_config
from sana_jax.weights import (
  files,
  lora_files,
  opening,
  orbax_files,
  torch_zip,
  zoo,
)

PRESETS: dict[str, Callable[[], config_lib.Config]] = {
  "sana_600m": config_lib.sana_600m,
  "sana_1600m": config_lib.sana_1600m,
  "sana_1600m_2k": config_lib.sana_1600m_2k,
  "sana_1600m_4k": config_lib.sana_1600m_4k,
  "sana15_1600m": config_lib.sana15_1600m,
  "sana15_4800m": config_lib.sana15_4800m,
  "sana_sprint_600m": config_lib.sana_sprint_600m,
  "sana_sprint_1600m": config_lib.sana_sprint_1600m,
  "sana_controlnet_600m": config_lib.sana_controlnet_600m,
  "sana_controlnet_1600m": config_lib.sana_controlnet_1600m,
  "dc_ae_f32c32": config_lib.DCAEConfig,
  "dc_ae_lite": config_lib.dc_ae_lite,
  "gemma_2_2b": config_lib.Gemma2Config,
}
_BLOCKS = ("num_layers", "width", "in_channels", "patch_size")
_KEY_NUMBERS = {
  config_lib.SanaConfig: (
    *(*_BLOCKS, "caption_channels", "qk_norm", "guidance_embeds"),
    *("interpolation_scale", "sample_size"),
  ),
  config_lib.SanaControlNetConfig: (*_BLOCKS, "caption_channels"),
  config_lib.DCAEConfig: (
    *("spatial_compression", "latent_channels", "encoder_block_out_channels"),
    *("decoder_block_out_channels", "encoder_layers_per_block"),
    "decoder_layers_per_block",
  ),
  config_lib.Gemma2Config: (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"),
  ),
}
# What None means, for an even number of layers.
_ALTERNATING = ("sliding_attention", "full_attention")
_INDEX = "model_index.json"
_COMPONENTS = ("text_encoder", "transformer", "vae")

Report = dict[str, Any]


def describe(
  path: epath.PathLike,
  *,
  variant: str | None = None,
  config_file: epath.PathLike | None = None,
) -> Report:
  """Describes a pipeline, a training run, a component or a LoRA file.

  Args:
    variant: such as "fp16", for the components that have it.
    config_file: config.json of a component that has none beside it.

  Raises:
    FileNotFoundError: something is missing.
    ValueError: the contents are unreadable, or their kind cannot be told.
  """
  path = epath.Path(path)
  if (path / _INDEX).is_file():
    report = _pipeline(path, variant)
  elif (path / "checkpoints").is_dir() and (path / "config.json").is_file():
    report = _training_run(path)
  elif lora := _lora_file(path):
    report = _lora(lora)
  else:
    component = opening.open_any(path, config_file=config_file, variant=variant)
    report = _component(component) | _beside(path)
  return {"path": str(path), **report, **_published(path), **_card(path)}


def _published(path: epath.Path) -> Report:
  """What the table of published checkpoints says of one with this name."""
  names = (str(path), str(path.parent))
  entry = next(filter(None, map(zoo.lookup, names)), None)
  if entry is None:
    return {}
  return {
    "published_as": entry.name,
    "trained_in": entry.precision,
    "resolution": entry.resolution,
    "licence": entry.licence,
    "text_encoder_licence": zoo.TEXT_ENCODER_LICENCE,
  }


def problems(report: Mapping[str, Any]) -> list[str]:
  """Collects the problems of a report and of the reports in it."""
  found = list(report.get("problems", ()))
  for name, part in report.get("components", {}).items():
    found += [f"{name}: {problem}" for problem in problems(part)]
  return found


def architecture(config: config_lib.Config) -> str | None:
  """Returns the name of the published architecture a config has, if one.

  The size of the images is no part of it, except where positions are embedded.
  """
  config = dataclasses.replace(config)
  free = {}
  if isinstance(config, config_lib.SanaConfig):
    free = {"timestep_scale": 1.0}
    if config.interpolation_scale is None:
      free["sample_size"] = config_lib.SanaConfig.sample_size
  elif isinstance(config, config_lib.SanaControlNetConfig):
    free = {"sample_size": config_lib.SanaControlNetConfig.sample_size}
  elif isinstance(config, config_lib.DCAEConfig):
    free = {"scaling_factor": config_lib.DCAEConfig.scaling_factor}
  elif config.layer_types == _ALTERNATING * (config.num_hidden_layers // 2):
    free = {"layer_types": None}
  config = dataclasses.replace(config, **free)
  found = [name for name, preset in PRESETS.items() if preset() == config]
  return found[0] if found else None


def _component(component: opening.Component) -> Report:
  pattern = "|".join(f"(?:{regex})" for regex in component.ignored) or r"(?!)"
  ignored = [n for n in component.tensors if re.fullmatch(pattern, n)]
  return {
    "kind": component.kind,
    "layout": component.layout,
    "architecture": architecture(component.config),
    "config": {
      name: getattr(component.config, name)
      for name in _KEY_NUMBERS[type(component.config)]
    },
    **_contents(component.tensors, ignored),
    "ignored": ignored,
    "problems": component.problems(),
  }


def _contents(tensors: files.Tensors, ignored=()) -> Report:
  dtypes: dict[str, Counter] = defaultdict(Counter)
  for tensor in tensors.values():
    dtypes[str(tensor.dtype)] += Counter(tensors=1, bytes=tensor.nbytes)
  return {
    "parameters": sum(
      math.prod(tensor.shape)
      for name, tensor in tensors.items()
      if name not in ignored
    ),
    "tensors": len(tensors),
    "bytes": sum(tensor.nbytes for tensor in tensors.values()),
    "dtypes": {name: dict(count) for name, count in sorted(dtypes.items())},
  }


def _beside(path: epath.Path) -> Report:
  """What a file or directory has besides the tensors of a component."""
  if path.is_dir():
    found = files.variants(path)
    return {"variants": sorted(v for v in found if v)} if found else {}
  if path.suffix == ".safetensors":
    return {}
  contents = torch_zip.read_contents(path)
  if not isinstance(contents, Mapping) or "state_dict" not in contents:
    return {"ema": False}
  numbers = {
    name: value
    for name, value in contents.items()
    if name in ("step", "global_step", "epoch") and isinstance(value, int)
  }
  return {"ema": "state_dict_ema" in contents, **numbers}


def _pipeline(path: epath.Path, variant: str | None) -> Report:
  index = files.read_json(path / _INDEX)
  parts, missing = {}, []
  for name in _COMPONENTS:
    if not (path / name).is_dir():
      missing.append(f"missing directory {name}")
      continue
    has_variant = variant in files.variants(path / name)
    component = opening.open_any(
      path / name, variant=variant if has_variant else None
    )
    parts[name] = _component(component) | _beside(path / name)
  if variant is not None and not any(
    variant in part.get("variants", ()) for part in parts.values()
  ):
    raise FileNotFoundError(
      f"No component of {path} has weights of variant {variant!r}."
    )
  solver = scheduler_config.from_config(
    files.read_json(path / "scheduler" / "scheduler_config.json")
  )
  return {
    "kind": "pipeline",
    "class": index.get("_class_name"),
    "solver": {"name": type(solver).__name__, **_settings(solver)},
    "components": parts,
    "parameters": sum(part["parameters"] for part in parts.values()),
    "bytes": sum(part["bytes"] for part in parts.values()),
    "problems": missing,
  }


def _settings(solver: scheduler_config.Solver) -> Report:
  """The settings of a solver that checkpoints differ in."""
  values = scheduler_config.to_config(solver)
  wanted = ("flow_shift", "shift", "solver_order", "sigma_data")
  return {name: values[name] for name in wanted if name in values}


def _training_run(path: epath.Path) -> Report:
  values = files.read_json(path / "config.json")
  text_to_image = "flow" in values
  configs: dict[str, tuple[type, str]] = (
    {
      "transformer": (config_lib.SanaConfig, "model"),
      "text_encoder": (config_lib.Gemma2Config, "text_encoder"),
    }
    if text_to_image
    else {"autoencoder": (config_lib.DCAEConfig, "model")}
  )
  steps = sorted(
    int(p.name) for p in (path / "checkpoints").iterdir() if p.name.isdigit()
  )
  report = {
    "kind": "training run",
    "trains": "text to image" if text_to_image else "autoencoder",
    "steps": steps,
    "num_steps": values.get("num_steps"),
    "exported": (path / "export").is_dir(),
  }
  if text_to_image:
    report["flow_shift"] = values["flow"]["shift"]
  if not steps:
    return report | {"step": None, "problems": ["no checkpoint"]}
  state = orbax_files.open_tree(path / "checkpoints" / str(steps[-1]) / "state")
  parts = {}
  has_average = any(name.startswith("ema/") for name in state)
  kept = "ema" if has_average else "params"
  names = {n.split("/")[1] for n in state if n.startswith(f"{kept}/")}
  for name in sorted(names):
    if name not in configs:
      parts[name] = _contents(_under(state, f"{kept}/{name}/"))
      continue
    cls, key = configs[name]
    component = opening.component(
      config_lib.from_dict(cls, values[key]), _under(state, f"{kept}/{name}/")
    )
    parts[name] = _component(component)
  return report | {
    "step": steps[-1],
    "ema": has_average,
    "components": parts,
    "bytes": sum(tensor.nbytes for tensor in state.values()),
    "optimizer_bytes": sum(
      tensor.nbytes for tensor in _under(state, "opt_state/").values()
    ),
  }


def _under(tensors: files.Tensors, prefix: str) -> dict[str, files.Tensor]:
  return {
    name.removeprefix(prefix): tensor
    for name, tensor in tensors.items()
    if name.startswith(prefix)
  }


def _lora_file(path: epath.Path) -> epath.Path | None:
  file = path
  if path.is_dir():
    found = [path / name for name in lora_files.FILES if (path / name).exists()]
    file = found[0] if found else path
  if file.suffix != ".safetensors" or not file.is_file():
    return None
  names = files.open_safetensors(file)
  is_lora = any(".lora_" in name or ".lora." in name for name in names)
  return file if is_lora else None


def _lora(path: epath.Path) -> Report:
  contents = _contents(files.open_safetensors(path))
  try:
    pairs = lora_files.load(path).pairs
  except ValueError as error:
    return {"kind": "lora", **contents, "problems": [str(error)]}
  blocks = [re.search(r"\.(\d+)\.", module) for module in pairs]
  targets = {re.sub(r".*\.\d+\.", "", module, count=1) for module in pairs}
  return {
    "kind": "lora",
    "ranks": sorted({pair.rank for pair in pairs.values()}),
    "alphas": sorted({pair.alpha for pair in pairs.values()}),
    "targets": sorted(targets),
    "blocks": len({match[1] for match in blocks if match}),
    "widths": sorted({pair.down.shape[1] for pair in pairs.values()}),
    **contents,
    "problems": [],
  }


def _card(path: epath.Path) -> Report:
  """The licence that the model card of a directory names."""
  card = (path if path.is_dir() else path.parent) / "README.md"
  text = card.read_text() if card.is_file() else ""
  header = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
  values = dict(
    re.findall(r"^(license|license_name): *(\S+)$", header[1], re.MULTILINE)
    if header
    else ()
  )
  name = values.get("license_name", values.get("license"))
  return {"licence": name} if name else {}
