"""Sizes are read once, without pixels, and belong to one set of keys."""

import numpy as np
import pytest

from sana_jax.data import scan, sources, storage
from sana_jax.data.sources import folder as folder_lib
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


class Unreliable(folder_lib.FolderSource):
  """A folder on a disk that fails a number of times for every picture."""

  def __init__(self, path, failures):
    super().__init__(storage.Location.of(path))
    self.failures = dict.fromkeys(range(len(self)), failures)

  def image_head(self, index, size):
    if self.failures[index]:
      self.failures[index] -= 1
      raise OSError("disk on fire")
    return super().image_head(index, size)


def test_what_a_disk_does_not_give_at_once_is_asked_for_again(folder):
  expected = scan.scan(sources.open_source(folder))
  found = scan.scan(Unreliable(folder, 2))
  assert found.problem == expected.problem
  np.testing.assert_array_equal(found.height, expected.height)


def test_records_that_cannot_be_read_are_problems(folder):
  source = Unreliable(folder, 0)
  source.failures[1] = 1000
  found = scan.scan(source)
  assert found.problem[1] == "disk on fire"
  assert found.problem[0] is found.problem[2] is None


def test_parts_of_a_scan_make_the_whole(folder, tmp_path):
  source = sources.open_source(folder)
  whole = scan.scan(source)
  parts = [
    scan.scan(source, part=range(*ends)) for ends in ((0, 2), (2, 2), (2, 6))
  ]
  sent = [scan.Scan.from_bytes(part.to_bytes()) for part in parts]
  joined = scan.join(sent)
  assert joined.to_bytes() == whole.to_bytes()
  (tmp_path / "a.png").write_bytes(b"")
  other = scan.scan(sources.open_source(tmp_path))
  with pytest.raises(ValueError, match="parts are of .* different keys"):
    scan.join([whole, other])
