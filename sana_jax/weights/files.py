"""Reads and writes the files of published checkpoints.

Readers return mappings from tensor names to `Tensor`, which knows its shape and
reads its values when asked to. Nothing a file contains is executed, and sizes
are checked before memory is taken.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

_DTYPES = {
  "F64": np.dtype(np.float64),
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "I16": np.dtype(np.int16),
  "I8": np.dtype(np.int8),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER_BYTES = 100 * 10**6
_HASH_CHUNK = 1 << 24
# Shards of a variant, such as model.bf16-00001-of-00002.safetensors, are not
# whole files: the variant's name has no hyphen.
_STEM = r"(?:diffusion_pytorch_model|model)"
_FILE_NAME = re.compile(_STEM + r"(?:\.(?P<variant>[^.-]+))?\.safetensors")
_INDEX_NAME = re.compile(
  _STEM + r"\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json"
)
_SHARD_NAME = re.compile(
  # Two generations of names.
  _STEM
  + r"(?:\.(?P<new>[^.-]+))?-\d+-of-\d+(?:\.(?P<old>[^.-]+))?\.safetensors"
)
# diffusers and transformers split files above this size.
_MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Tensor:
  """A tensor in a file: `np.asarray(tensor)` reads it."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    array = self.read()
    return array if dtype is None else array.astype(dtype)


Tensors = Mapping[str, Tensor]


def read_json(path: epath.PathLike) -> dict[str, Any]:
  """Parses a JSON object.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: the contents are not a JSON object.
  """
  path = epath.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; expected a JSON file.")
  try:
    value = json.loads(path.read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{path} is not valid JSON ({error}); download it again."
    ) from error
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds a JSON {type(value).__name__}, not object.")
  return value


def variants(directory: epath.PathLike) -> set[str | None]:
  """Lists the variants a component has weights in; None is the usual one.

  Raises:
    FileNotFoundError: there is no such directory.
  """
  return set(_entry_points(epath.Path(directory)))


def group_by_variant(names: Iterable[str]) -> dict[str | None, list[str]]:
  """Lists by variant the file names that loading a component would read.

  Where a variant is there both whole and in shards, the whole file is read.
  """
  names = sorted(names)
  groups: dict[str | None, list[str]] = {}
  for name in names:
    if match := _FILE_NAME.fullmatch(name):
      groups[match["variant"]] = [name]
  whole = set(groups)
  for name in names:
    if match := _INDEX_NAME.fullmatch(name):
      variant = match["variant"]
    elif match := _SHARD_NAME.fullmatch(name):
      variant = match["new"] or match["old"]
    else:
      continue
    if variant not in whole:
      groups.setdefault(variant, []).append(name)
  return groups


def weight_files(
  directory: epath.PathLike, *, variant: str | None = None
) -> list[epath.Path]:
  """Finds the safetensors files of one component, an index resolved to shards.

  Args:
    directory: such as `transformer/` of a diffusers checkpoint.
    variant: "fp16", "bf16", ...; None takes the files without a variant or,
      if there are none, the only variant there is.

  Raises:
    FileNotFoundError: no weights, or shards named by the index are missing.
    ValueError: several variants and no choice, or an index naming paths.
  """
  directory = epath.Path(directory)
  found = _entry_points(directory)
  if variant is None and None not in found and len(found) > 1:
    raise ValueError(
      f"{directory} has weights in the variants {sorted(found)}; choose one "
      f"with variant=..."
    )
  if variant is None and None not in found and found:
    variant = next(iter(found))
  if variant not in found:
    named = "" if variant is None else f" of variant {variant!r}"
    present = sorted(path.name for path in directory.iterdir())
    raise FileNotFoundError(
      f"{directory} has no safetensors weights{named}; it has {present}."
    )
  entry = found[variant]
  return [entry] if entry.suffix == ".safetensors" else _shards(entry)


def weights_sha256(
  directory: epath.PathLike, *, variant: str | None = None
) -> str:
  """Returns the digest of a component's weights; see `weight_files`."""
  return sha256(sorted(weight_files(directory, variant=variant)))


def sha256(paths: Iterable[epath.Path]) -> str:
  """Returns the digest of several files, one after the other."""
  digest = hashlib.sha256()
  for path in paths:
    with path.open("rb") as file:
      while chunk := file.read(_HASH_CHUNK):
        digest.update(chunk)
  return digest.hexdigest()


def open_component(
  directory: epath.PathLike, *, variant: str | None = None
) -> Tensors:
  """Opens all weights of a component directory; see `weight_files`."""
  tensors: dict[str, Tensor] = {}
  for path in weight_files(directory, variant=variant):
    tensors.update(open_safetensors(path))
  return tensors


def open_safetensors(path: epath.PathLike) -> Tensors:
  """Reads the header of a safetensors file.

  Raises:
    ValueError: not a safetensors file, or a truncated one.
  """
  path = epath.Path(path)
  size = path.stat().length
  entries, _, start = _header(path)
  try:
    parsed = {name: _entry(value) for name, value in entries.items()}
  except (ValueError, KeyError, TypeError) as error:
    raise _broken(path, f"its header does not parse: {error!r}") from error
  tensors = {}
  for name, (dtype, shape, begin, end) in parsed.items():
    if (
      not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize
    ):
      raise _broken(path, f"tensor {name} has inconsistent offsets")
    if start + end > size:
      raise _broken(
        path, f"it ends at byte {size}, tensor {name} at {start + end}"
      )
    tensors[name] = Tensor(
      shape, dtype, _region_reader(path, start + begin, dtype, shape)
    )
  return tensors


def safetensors_metadata(path: epath.PathLike) -> dict[str, str]:
  """Reads the free texts in the header of a safetensors file.

  Raises:
    ValueError: not a safetensors file, or a truncated one.
  """
  return _header(epath.Path(path))[1]


def write_component(
  directory: epath.PathLike,
  config: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray | Tensor],
  *,
  stem: str = "diffusion_pytorch_model",
  max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
  """Writes config.json and safetensors weights, with an index if split.

  Args:
    tensors: one at a time is read, in this order.
    stem: of the file names; transformers components use "model".
  """
  directory = epath.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  write_json(directory / "config.json", config)
  shards = _split(tensors, max_shard_bytes)
  if len(shards) == 1:
    _write_safetensors(directory / f"{stem}.safetensors", shards[0])
    return
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
    _write_safetensors(directory / name, shard)
    weight_map |= dict.fromkeys(shard, name)
  total = sum(tensor.nbytes for tensor in tensors.values())
  index = {"metadata": {"total_size": total}, "weight_map": weight_map}
  write_json(directory / f"{stem}.safetensors.index.json", index)


def write_json(path: epath.PathLike, value: Any) -> None:
  """Writes indented JSON with a final newline."""
  text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
  epath.Path(path).write_text(text + "\n")


def _entry_points(directory: epath.Path) -> dict[str | None, epath.Path]:
  """Maps variants to the file, or index of files, that holds their weights."""
  if not directory.is_dir():
    raise FileNotFoundError(
      f"{directory} does not exist; expected a directory with config.json and "
      "safetensors weights."
    )
  found: dict[str | None, epath.Path] = {}
  for pattern in (_INDEX_NAME, _FILE_NAME):  # a whole file beats an index
    for path in directory.iterdir():
      if match := pattern.fullmatch(path.name):
        found[match["variant"]] = path
  return found


def _shards(index: epath.Path) -> list[epath.Path]:
  weight_map = read_json(index).get("weight_map")
  if not isinstance(weight_map, dict):
    raise ValueError(f"{index} has no weight_map; download it again.")
  names = sorted({str(name) for name in weight_map.values()})
  unsafe = [
    name
    for name in names
    if "/" in name or "\\" in name or not name.endswith(".safetensors")
  ]
  if unsafe:
    raise ValueError(
      f"{index} names {unsafe}; shards must be safetensors files beside it."
    )
  missing = [name for name in names if not (index.parent / name).is_file()]
  if missing:
    raise FileNotFoundError(
      f"{index.parent} lacks {missing}, which {index.name} names; download "
      "them."
    )
  return [index.parent / name for name in names]


def _header(path: epath.Path) -> tuple[dict[str, Any], dict[str, str], int]:
  """Returns the entries of all tensors, the metadata, where data begin."""
  size = path.stat().length
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
      raise _broken(path, f"its header would take {length} of {size} bytes")
    header = file.read(length)
  try:
    entries = json.loads(header)
    metadata = entries.pop("__metadata__", None) or {}
    metadata = {name: str(text) for name, text in metadata.items()}
  except (ValueError, TypeError, AttributeError) as error:
    raise _broken(path, f"its header does not parse: {error!r}") from error
  return entries, metadata, 8 + length


def _entry(value: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
  begin, end = value["data_offsets"]
  shape = tuple(int(n) for n in value["shape"])
  if any(n < 0 for n in shape):
    raise ValueError(f"negative shape {shape}")
  return _DTYPES[value["dtype"]], shape, int(begin), int(end)


def _region_reader(path, offset: int, dtype: np.dtype, shape):
  count = math.prod(shape)

  def read() -> np.ndarray:
    if count and "://" not in os.fspath(path):
      # Mapped, so that a shard reads its part only; unmapped with the array.
      return np.asarray(np.memmap(path, dtype, "r", offset, shape))
    with path.open("rb") as file:
      file.seek(offset)
      data = file.read(count * dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape)

  return read


def _broken(path: epath.Path, cause: str) -> ValueError:
  return ValueError(
    f"{path} is not a complete safetensors file: {cause}; download it again."
  )


def _split(
  tensors: Mapping[str, np.ndarray | Tensor], limit: int
) -> list[dict[str, np.ndarray | Tensor]]:
  shards: list[dict[str, np.ndarray | Tensor]] = [{}]
  size = 0
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.nbytes > limit:
      shards.append({})
      size = 0
    shards[-1][name] = tensor
    size += tensor.nbytes
  return shards


def _write_safetensors(
  path: epath.Path, tensors: Mapping[str, np.ndarray | Tensor]
) -> None:
  """Writes tensors as they are read; the library would hold them all twice."""
  # Wide types first, so that every tensor is aligned.
  names = sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize)
  # diffusers and transformers refuse files without this metadata.
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
  end = 0
  for name in names:
    begin, end = end, end + tensors[name].nbytes
    header[name] = {
      "dtype": _DTYPE_NAMES[tensors[name].dtype],
      "shape": tensors[name].shape,
      "data_offsets": (begin, end),
    }
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
      array = np.ascontiguousarray(tensors[name])
      file.write(array.reshape(-1).view(np.uint8).data)
