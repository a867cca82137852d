"""LoRA files in the layouts of diffusers and of peft."""

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import safetensors.numpy
from etils import epath

from sana_jax.weights import files

_DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE = "adapter_model.safetensors"
_PEFT_CONFIG = "adapter_config.json"
FILES = (_DIFFUSERS_FILE, _PEFT_FILE)
_METADATA = "lora_adapter_metadata"
# diffusers names the component before the module, peft its wrappers, and
# `load_lora_adapter(prefix=None)` nothing.
_PREFIX = r"(?:transformer\.|base_model\.model\.)?"
_KEY = re.compile(
  _PREFIX + r"(?P<module>.+?)\."
  r"(?:(?P<down>lora_A\.weight|lora\.down\.weight)"
  r"|(?P<up>lora_B\.weight|lora\.up\.weight)"
  r"|(?P<alpha>alpha))"
)
# Settings of peft that change what an adapter computes, and that only have the
# values None, False and empty here.
_UNSUPPORTED = (
  "alora_invocation_tokens",
  "arrow_config",
  "layer_replication",
  "lora_bias",
  "modules_to_save",
  "monteclora_config",
  "target_parameters",
  "trainable_token_indices",
  "use_bdlora",
  "use_dora",
  "use_qalora",
  "velora_config",
)


@dataclass(frozen=True)
class Pair:
  """The update alpha / rank * up @ down of one weight, in PyTorch's layout.

  Args:
    down: [rank, in], of a convolution [rank, in, kh, kw].
    up: [out, rank], of a convolution [out, rank, 1, 1].
  """

  down: np.ndarray
  up: np.ndarray
  alpha: float

  @property
  def rank(self) -> int:
    return self.down.shape[0]


@dataclass(frozen=True)
class Lora:
  """An adapter: updates by the published names of the modules they belong to.

  Args:
    source: names the file in error messages.
  """

  pairs: Mapping[str, Pair]
  source: str = "LoRA"


@dataclass
class _Parts:
  """What a file has of one module."""

  down: list[np.ndarray] = field(default_factory=list)
  up: list[np.ndarray] = field(default_factory=list)
  alpha: list[np.ndarray] = field(default_factory=list)


def load(path: epath.PathLike) -> Lora:
  """Reads an adapter, as diffusers or peft writes it.

  alpha comes from the file's metadata (peft: from adapter_config.json), else
  from its `.alpha` tensors, else it is the rank.

  Args:
    path: a `.safetensors` file, or the directory it is in.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: lists all tensors that are not part of a plain LoRA, that do
      not fit together, or that contradict the metadata.
  """
  path = _find(epath.Path(path))
  settings = _settings(path)
  parts, problems = _sort(files.open_safetensors(path))
  problems += _refused(settings)
  pairs = {}
  for module, part in parts.items():
    problem = _mismatch(part)
    if problem is None:
      pair = Pair(part.down[0], part.up[0], float(part.down[0].shape[0]))
      alpha, problem = _alpha(module, pair.rank, settings, part.alpha)
      pairs[module] = Pair(pair.down, pair.up, alpha)
    if problem is not None:
      problems.append(f"{module}: {problem}")
  if not parts:
    problems.append("there are no LoRA tensors")
  if problems:
    raise ValueError(
      f"{path} is not a LoRA that can be used; save it as plain LoRA (lora_A "
      "and lora_B) with diffusers or peft:\n  " + "\n  ".join(problems)
    )
  return Lora(pairs, str(path))


def save(path: epath.PathLike, lora: Lora) -> None:
  """Writes an adapter in the layout of diffusers, metadata included.

  Args:
    path: a `.safetensors` file, or a directory, where the file gets the name
      that diffusers looks for.

  Raises:
    ValueError: the adapter is empty.
  """
  if not lora.pairs:
    raise ValueError(f"{lora.source} has no updates; there is nothing to save.")
  path = epath.Path(path)
  if path.suffix != ".safetensors":
    path = path / _DIFFUSERS_FILE
  path.parent.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for module, pair in lora.pairs.items():
    for name, array in (("lora_A", pair.down), ("lora_B", pair.up)):
      key = f"transformer.{module}.{name}.weight"
      tensors[key] = np.ascontiguousarray(array)
  settings = {
    f"transformer.{name}": value for name, value in _describe(lora).items()
  }
  metadata = {"format": "pt", _METADATA: json.dumps(settings, sort_keys=True)}
  path.write_bytes(safetensors.numpy.save(tensors, metadata))


def files_of(path: epath.PathLike) -> list[epath.Path]:
  """Lists the files that `load` reads.

  Raises:
    FileNotFoundError: there is no such file.
  """
  path = _find(epath.Path(path))
  if path.name == _PEFT_FILE:
    return [path, path.parent / _PEFT_CONFIG]
  return [path]


def _find(path: epath.Path) -> epath.Path:
  if path.is_file():
    return path
  for name in (_DIFFUSERS_FILE, _PEFT_FILE):
    if (path / name).is_file():
      return path / name
  present = (
    sorted(file.name for file in path.iterdir()) if path.is_dir() else []
  )
  raise FileNotFoundError(
    f"{path} has no LoRA: expected a .safetensors file, or a directory with "
    f"{_DIFFUSERS_FILE} or {_PEFT_FILE}; found {present}."
  )


def _settings(path: epath.Path) -> dict[str, Any] | None:
  """The LoraConfig of an adapter; None: nothing is said."""
  if path.name == _PEFT_FILE:
    return files.read_json(path.parent / _PEFT_CONFIG)
  text = files.safetensors_metadata(path).get(_METADATA)
  if text is None:
    return None
  try:
    values = json.loads(text)
    return {k.removeprefix("transformer."): v for k, v in values.items()}
  except (json.JSONDecodeError, AttributeError) as error:
    raise ValueError(
      f"{path} has {_METADATA} that is not a JSON object: {error}."
    ) from error


def _sort(tensors: files.Tensors) -> tuple[dict[str, _Parts], list[str]]:
  """Groups tensors by module; the second list names what does not belong."""
  parts: dict[str, _Parts] = defaultdict(_Parts)
  problems = []
  for key, tensor in tensors.items():
    match = _KEY.fullmatch(key)
    if match:
      part = parts[match["module"]]
      kinds = {"down": part.down, "up": part.up, "alpha": part.alpha}
      kinds[match.lastgroup].append(np.asarray(tensor))
    elif "magnitude_vector" in key or "dora_scale" in key:
      problems.append(f"{key} belongs to DoRA, which is not supported")
    elif key.endswith(".bias") and "lora" in key:
      problems.append(f"{key} is the bias of an update; only matrices have one")
    else:
      problems.append(f"{key} is not a LoRA tensor")
  return parts, problems


def _mismatch(part: _Parts) -> str | None:
  if (len(part.down), len(part.up)) != (1, 1) or len(part.alpha) > 1:
    counts = (len(part.down), len(part.up), len(part.alpha))
    return "has {} down (lora_A), {} up (lora_B), {} alpha tensors".format(
      *counts
    )
  down, up = part.down[0].shape, part.up[0].shape
  fits = len(down) == len(up) and len(down) in (2, 4) and up[2:] in ((), (1, 1))
  if not fits or down[0] != up[1] or not down[0]:
    return f"ranks differ: lora_A has shape {down}, lora_B {up}"
  return None


def _refused(settings: dict[str, Any] | None) -> list[str]:
  settings = settings or {}
  problems = [
    f"its metadata sets {name}={settings[name]!r}, which is not supported"
    for name in _UNSUPPORTED
    if settings.get(name) not in (None, False, [], {})
  ]
  kind = settings.get("peft_type", "LORA")
  if kind != "LORA":
    problems.append(f"its metadata says peft_type={kind!r}, expected 'LORA'")
  return problems


def _alpha(
  module: str,
  rank: int,
  settings: dict[str, Any] | None,
  tensors: list[np.ndarray],
) -> tuple[float, str | None]:
  """Returns alpha, so that alpha / rank is the factor; or what is wrong."""
  alpha = tensors[0] if tensors else rank
  said = rank
  if settings is not None:
    said = _by_pattern(settings, "rank_pattern", module, settings.get("r"))
    alpha = _by_pattern(
      settings, "alpha_pattern", module, settings.get("lora_alpha")
    )
  if said != rank:
    return 0.0, f"its rank is {rank}, the metadata says {said}"
  try:
    alpha = float(np.asarray(alpha).item())
  except (TypeError, ValueError):
    return 0.0, f"alpha must be a number, got {alpha!r}"
  if not math.isfinite(alpha):
    return 0.0, f"alpha must be finite, got {alpha}"
  if settings is not None and settings.get("use_rslora"):
    alpha *= math.sqrt(rank)  # The factor is alpha / sqrt(rank).
  return alpha, None


def _by_pattern(
  settings: dict[str, Any], name: str, module: str, default: Any
) -> Any:
  """Looks a module up as peft does: the first pattern that ends its name."""
  for pattern, value in (settings.get(name) or {}).items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return value
  return default


def _describe(lora: Lora) -> dict[str, Any]:
  """The LoraConfig of an adapter: the common values, and the exceptions."""
  pairs = sorted(lora.pairs.items())
  ranks = {module: pair.rank for module, pair in pairs}
  alphas = {module: pair.alpha for module, pair in pairs}
  rank = Counter(ranks.values()).most_common(1)[0][0]
  alpha = Counter(alphas.values()).most_common(1)[0][0]
  return {
    "peft_type": "LORA",
    "r": rank,
    "lora_alpha": alpha,
    "rank_pattern": {f"^{m}": r for m, r in ranks.items() if r != rank},
    "alpha_pattern": {f"^{m}": a for m, a in alphas.items() if a != alpha},
    "target_modules": sorted(lora.pairs),
  }
