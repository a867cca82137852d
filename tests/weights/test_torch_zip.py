"""PyTorch archives are read without PyTorch, and only if they are harmless.

The archives are written here opcode by opcode, as `torch.save` writes them.
"""

import io
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest

from sana_jax.weights import torch_zip

STORAGES = {
  "float32": "FloatStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "float64": "DoubleStorage",
  "int64": "LongStorage",
  "uint8": "ByteStorage",
}


class Global:
  """Pickled as a reference to module.name, importable or not."""

  def __init__(self, module: str, name: str):
    self.module, self.name = module, name


class View:
  """A tensor as part of a storage."""

  def __init__(self, key, storage, offset, shape, strides):
    self.key, self.storage = key, storage
    self.layout = (offset, shape, strides)


class Pickler(pickle._Pickler):
  def __init__(self, file):
    super().__init__(file, protocol=2)

  def save(self, value, save_persistent_id=True):
    if isinstance(value, Global):
      self.write(f"c{value.module}\n{value.name}\n".encode())
    elif isinstance(value, View):
      self.save(Global("torch._utils", "_rebuild_tensor_v2"))
      kind = Global("torch", STORAGES[value.storage.dtype.name])
      pid = ("storage", kind, value.key, "cpu", value.storage.size)
      self.write(b"(")
      self.save(pid)
      self.write(b"Q")
      for item in (*value.layout, False):
        self.save(item)
      self.save({})
      self.write(b"tR")
    else:
      super().save(value, save_persistent_id)


def write(path, contents, storages, *, compression=zipfile.ZIP_STORED):
  buffer = io.BytesIO()
  Pickler(buffer).dump(contents)
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", buffer.getvalue())
    archive.writestr("archive/byteorder", "little")
    for key, storage in storages.items():
      archive.writestr(f"archive/data/{key}", storage.tobytes())
    archive.writestr("archive/version", "3\n")


@pytest.fixture
def storage(rng):
  return rng.normal(size=24).astype(np.float32)


@pytest.mark.parametrize(
  "dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8]
)
def test_tensors_of_many_dtypes_are_read(tmp_path, rng, dtype):
  storage = rng.uniform(0, 100, size=6).astype(dtype)
  view = View("0", storage, 0, (2, 3), (3, 1))
  write(tmp_path / "x.pth", {"a.weight": view}, {"0": storage})
  found = torch_zip.open_pth(tmp_path / "x.pth")
  array = np.asarray(found["a.weight"])
  assert array.dtype == dtype
  np.testing.assert_array_equal(array, storage.reshape(2, 3))


def test_views_have_offsets_and_strides(tmp_path, storage):
  views = {
    "transposed": View("0", storage, 4, (3, 2), (1, 3)),
    "scalar": View("0", storage, 23, (), ()),
    "empty": View("0", storage, 0, (0, 4), (4, 1)),
  }
  write(tmp_path / "x.pth", views, {"0": storage})
  found = torch_zip.open_pth(tmp_path / "x.pth")
  expected = storage[4:10].reshape(2, 3).T
  np.testing.assert_array_equal(np.asarray(found["transposed"]), expected)
  assert np.asarray(found["scalar"]) == storage[23]
  assert np.asarray(found["empty"]).shape == (0, 4)


def test_the_state_dict_of_a_training_checkpoint_is_found(tmp_path, storage):
  view = View("0", storage, 0, (24,), (1,))
  contents = {"state_dict": {"w": view}, "epoch": 3, "name": "run"}
  write(tmp_path / "x.pth", contents, {"0": storage})
  assert set(torch_zip.open_pth(tmp_path / "x.pth")) == {"w"}


@pytest.mark.parametrize(
  ("module", "name"),
  [("os", "system"), ("builtins", "eval"), ("torch.nn", "Linear")],
)
def test_anything_but_tensors_is_refused(tmp_path, module, name):
  write(tmp_path / "x.pth", {"w": Global(module, name)}, {})
  with pytest.raises(ValueError, match=f"contains a {module}.{name}; for saf"):
    torch_zip.open_pth(tmp_path / "x.pth")


@pytest.mark.parametrize(
  ("offset", "shape", "strides"),
  [
    (20, (5,), (1,)),
    (0, (5, 5), (5, 1)),
    (0, (10**12,), (0,)),
    (-1, (2,), (1,)),
    (0, (2,), (-1,)),
    (0, (2, 2), (1,)),
  ],
)
def test_tensors_that_exceed_their_storage_are_refused(
  tmp_path, storage, offset, shape, strides
):
  view = View("0", storage, offset, shape, strides)
  write(tmp_path / "x.pth", {"w": view}, {"0": storage})
  with pytest.raises(ValueError, match="cannot be read as a PyTorch"):
    torch_zip.open_pth(tmp_path / "x.pth")


def test_missing_short_and_compressed_storages_are_refused(tmp_path, storage):
  contents = {"w": View("0", storage, 0, (24,), (1,))}
  path = tmp_path / "x.pth"
  write(path, contents, {})
  with pytest.raises(ValueError, match="data/0 is missing"):
    torch_zip.open_pth(path)
  write(path, contents, {"0": storage[:20]})
  with pytest.raises(ValueError, match="storage 0 is incomplete"):
    torch_zip.open_pth(path)
  write(path, contents, {"0": storage}, compression=zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match="is compressed"):
    torch_zip.open_pth(path)


def test_other_files_are_refused(tmp_path, storage):
  path = tmp_path / "x.pth"
  path.write_bytes(pickle.dumps({"w": 1}))
  with pytest.raises(ValueError, match="convert it to safetensors"):
    torch_zip.open_pth(path)
  write(path, [1, 2], {})
  with pytest.raises(ValueError, match="holds a list; expected a state dict"):
    torch_zip.open_pth(path)
  write(path, {"w": View("0", storage, 0, (24,), (1,))}, {"0": storage})
  path.write_bytes(path.read_bytes()[:-30])
  with pytest.raises(ValueError, match="cannot be read as a PyTorch zip"):
    torch_zip.open_pth(path)
