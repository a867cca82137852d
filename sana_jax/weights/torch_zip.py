"""Reads `.pth` files: tensors only, without PyTorch and without trusting them.

Such a file is a zip archive of raw storages and a pickle that says which tensor
is which part of which storage. A pickle can call anything, so ours may name
nothing but the constructors of tensors and dictionaries.
"""

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from etils import epath

from sana_jax.weights import files

_STORAGES = {
  "DoubleStorage": np.dtype(np.float64),
  "FloatStorage": np.dtype(np.float32),
  "HalfStorage": np.dtype(np.float16),
  "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
  "LongStorage": np.dtype(np.int64),
  "IntStorage": np.dtype(np.int32),
  "ShortStorage": np.dtype(np.int16),
  "CharStorage": np.dtype(np.int8),
  "ByteStorage": np.dtype(np.uint8),
  "BoolStorage": np.dtype(np.bool_),
}
# What the unpickler raises when the pickle is not what it should be.
_MALFORMED = (
  zipfile.BadZipFile,
  pickle.UnpicklingError,
  AttributeError,
  EOFError,
  LookupError,
  OverflowError,
  TypeError,
)
_MAX_PICKLE_BYTES = 100 * 10**6


class _Storage(NamedTuple):
  entry: str
  dtype: np.dtype
  length: int


def open_pth(path: epath.PathLike) -> files.Tensors:
  """Lists the tensors of a `.pth`, of its `state_dict` entry if it has one.

  Raises:
    ValueError: not such a file, a truncated one, or one that contains more
      than tensors, numbers, strings and their containers.
  """
  contents = read_contents(path)
  if isinstance(contents, Mapping):
    contents = contents.get("state_dict", contents)
  if not isinstance(contents, Mapping):
    raise ValueError(
      f"{path} holds a {type(contents).__name__}; expected a state dict."
    )
  return {
    name: value
    for name, value in contents.items()
    if isinstance(value, files.Tensor)
  }


def read_contents(path: epath.PathLike) -> Any:
  """Returns all that is in a `.pth`, with `files.Tensor` for tensors.

  Raises:
    ValueError: as `open_pth`.
  """
  path = epath.Path(path)
  try:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
      return _Reader(path, archive).load()
  except _MALFORMED as error:
    raise ValueError(
      f"{path} cannot be read as a PyTorch zip archive ({error}); download it "
      "again, or convert it to safetensors with PyTorch."
    ) from error


class _Reader(pickle.Unpickler):
  """Unpickles tensor descriptions, and refuses every other object."""

  def __init__(self, path: epath.Path, archive: zipfile.ZipFile):
    self._path = path
    self._entries = {info.filename: info for info in archive.infolist()}
    pickles = [name for name in self._entries if name.endswith("/data.pkl")]
    if len(pickles) != 1:
      raise zipfile.BadZipFile(f"{len(pickles)} entries named data.pkl")
    self._root = pickles[0].removesuffix("data.pkl")
    if self._size(pickles[0]) > _MAX_PICKLE_BYTES:
      raise zipfile.BadZipFile("data.pkl is too large")
    order = self._root + "byteorder"
    if order in self._entries and archive.read(order).strip() != b"little":
      raise zipfile.BadZipFile("only little-endian files are supported")
    super().__init__(io.BytesIO(archive.read(pickles[0])))

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      return self._tensor
    if (module, name) == ("torch._utils", "_rebuild_parameter"):
      return lambda tensor, requires_grad, hooks: tensor
    if module == "torch" and name in _STORAGES:
      return _STORAGES[name]
    raise ValueError(
      f"{self._path} contains a {module}.{name}; for safety only tensors are "
      "read. Convert the file to safetensors with PyTorch, if you trust it."
    )

  def persistent_load(self, pid: Any) -> _Storage:
    kind, dtype, key, _, length = pid if len(pid) == 5 else [None] * 5
    entry = f"{self._root}data/{key}"
    if kind != "storage" or not isinstance(dtype, np.dtype):
      raise pickle.UnpicklingError(f"unknown reference {kind!r}")
    if self._size(entry) != length * dtype.itemsize:
      raise pickle.UnpicklingError(f"storage {key} is incomplete")
    return _Storage(entry, dtype, length)

  def _size(self, entry: str) -> int:
    if entry not in self._entries:
      raise zipfile.BadZipFile(f"{entry} is missing")
    info = self._entries[entry]
    # A compressed entry could unfold to any size.
    if info.compress_type != zipfile.ZIP_STORED:
      raise zipfile.BadZipFile(f"{entry} is compressed")
    return info.file_size

  def _tensor(
    self, storage, offset, shape, strides, requires_grad, hooks, metadata=None
  ) -> files.Tensor:
    shape, strides = tuple(shape), tuple(strides)
    if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
      raise pickle.UnpicklingError(f"impossible tensor of {storage.entry}")
    last = sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    span, count = last + 1, math.prod(shape)
    if count > storage.length or (count and offset + span > storage.length):
      raise pickle.UnpicklingError(f"a tensor exceeds its {storage.entry}")
    path = self._path

    def read() -> np.ndarray:
      if not count:
        return np.empty(shape, storage.dtype)
      with (
        path.open("rb") as file,
        zipfile.ZipFile(file) as archive,
        archive.open(storage.entry) as entry,
      ):
        entry.seek(offset * storage.dtype.itemsize)
        data = entry.read(span * storage.dtype.itemsize)
      flat = np.frombuffer(data, storage.dtype)
      steps = tuple(s * storage.dtype.itemsize for s in strides)
      return np.lib.stride_tricks.as_strided(flat, shape, steps)

    return files.Tensor(shape, storage.dtype, read)
