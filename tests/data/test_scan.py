"""Sizes are read once, without pixels, and belong to one set of keys."""

import numpy as np
import pytest

from sana_jax.data import records, scan, sources
from tests import pictures


class InMemory:
  """A source that is none of ours."""

  name = "in memory"

  def __init__(self, items):
    self._items = list(items)

  def __len__(self):
    return len(self._items)

  def __getitem__(self, index):
    return self._items[index]

  def __getitems__(self, indices):
    return [self._items[i] for i in indices]


@pytest.fixture
def folder(tmp_path, rng):
  contents = pictures.files(rng)
  contents["e.jpg"] = b""
  contents["f.png"] = rng.bytes(100)
  return pictures.write_folder(tmp_path / "folder", contents)


def test_sizes_and_problems_are_found_in_any_source(folder):
  source = sources.open_source(folder)
  for any_source in (source, InMemory(source)):
    found = scan.scan(any_source, num_threads=3)
    assert found.height.tolist() == [40, 24, 30, 24, 0, 0]
    assert found.width.tolist() == [20, 32, 30, 32, 0, 0]
    assert found.problem[:4] == [None] * 4
    assert "is empty" in found.problem[4]
    assert "format is unknown" in found.problem[5]
    assert found.fingerprint == scan.fingerprint(source.keys())


def test_a_size_behind_much_metadata_is_found(tmp_path, rng):
  content = pictures.encode(pictures.picture(rng), comment=b"x" * 65000)
  content = content[:2] + content[20:65024] + content[20:65024] + content[2:]
  assert len(content) > 2 * scan._HEAD - 2000
  (tmp_path / "a.jpg").write_bytes(content)
  (tmp_path / "b.png").write_bytes(
    pictures.encode(
      pictures.picture(rng).resize((400, 300)), "PNG", compress_level=0
    )
  )
  found = scan.scan(sources.open_source(tmp_path), num_threads=1)
  assert found.problem == [None, None]
  assert found.height.tolist() == [24, 300]


def test_a_saved_scan_is_of_its_source_alone(folder, tmp_path):
  source = sources.open_source(folder)
  path = tmp_path / "scan.npz"
  saved = scan.scan(source, num_threads=2)
  saved.save(path)
  assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
  loaded = scan.load(path, source)
  np.testing.assert_array_equal(loaded.height, saved.height)
  np.testing.assert_array_equal(loaded.width, saved.width)
  assert loaded.problem == saved.problem
  assert loaded.height.dtype == loaded.width.dtype == np.int32
  (folder / "d.jpg").rename(folder / "z.jpg")
  with pytest.raises(ValueError, match="other keys .* the data changed"):
    scan.load(path, sources.open_source(folder))
  path.write_bytes(b"PK no")
  with pytest.raises(ValueError, match="is not a scan"):
    scan.load(path, source)
  with pytest.raises(FileNotFoundError):
    scan.load(tmp_path / "none.npz", source)
  with pytest.raises(ValueError, match="num_threads must be at least 1, got 0"):
    scan.scan(source, num_threads=0)


def test_a_fingerprint_tells_orders_and_borders_apart():
  sets = [("ab", "c"), ("a", "bc"), ("c", "ab"), ("abc",), ()]
  assert len({scan.fingerprint(keys) for keys in sets}) == len(sets)


def test_records_that_cannot_be_read_are_problems():
  class Broken(InMemory):
    def __getitem__(self, index):
      if index == 1:
        raise OSError("disk on fire")
      return super().__getitem__(index)

  record = records.Record("a", b"", ())
  source = Broken([record, record])
  assert scan._measure(source, 0)[1][1] == "disk on fire"
