"""A manifest says what is finished, whatever happened to it."""

import json
import os

import numpy as np
import pytest

from sana_jax import storage
from sana_jax.bulk import manifest, plan, requests

IDENTITY = {"requests_sha256": "abc", "seed": 1, "num_hosts": 1}


@pytest.fixture
def directory(tmp_path):
  return storage.Directory(tmp_path)


@pytest.fixture
def images():
  """Ten images in four units."""
  return plan.make_plan([requests.Request("f", 1, "a", count=10)], batch_size=3)


def make_unit(directory, images, unit, text="content"):
  """Writes the files of a unit and returns its lines."""
  lines = []
  for index in images.indices(unit):
    directory.write(f"{index}.png", text.encode())
    lines.append({"index": index, "file": f"{index}.png", "bytes": len(text)})
  return lines


def fill(directory, images, units=None, **hosts):
  with manifest.Manifest(directory, images, **hosts) as opened:
    for unit in opened.units_to_do if units is None else units:
      opened.append(unit, make_unit(directory, images, unit))
    return opened.path.read_bytes()


def to_do(directory, images):
  with manifest.Manifest(directory, images) as opened:
    return opened.units_to_do


def test_finished_units_are_found_again(directory, images):
  assert to_do(directory, images) == [0, 1, 2, 3]
  fill(directory, images, [0, 1])
  with manifest.Manifest(directory, images) as opened:
    assert opened.units_to_do == [2, 3]
    assert opened.count() == (10, 6)
  whole = fill(directory, images)
  assert to_do(directory, images) == []
  assert [json.loads(line)["index"] for line in whole.splitlines()] == list(
    range(10)
  )


def test_a_manifest_cut_anywhere_is_completed_to_the_same_bytes(
  directory, images
):
  whole = fill(directory, images)
  path = directory.path / "manifest.jsonl"
  for cut in np.random.default_rng(0).integers(0, len(whole), 40):
    path.write_bytes(whole[:cut])
    left = to_do(directory, images)
    # Only whole units are left; no line of another one is.
    assert path.read_bytes().count(b"\n") == 10 - sum(
      len(images.indices(unit)) for unit in left
    )
    assert fill(directory, images) == whole


@pytest.mark.parametrize(
  "tail", [b"\x00\x00\n", b"[1]\n", b'{"index": 5}\n', b"\xff\n", b"null\n"]
)
def test_what_is_not_a_line_of_the_plan_is_cut_off(directory, images, tail):
  whole = fill(directory, images)
  (directory.path / "manifest.jsonl").write_bytes(whole[:0] + tail)
  assert to_do(directory, images) == [0, 1, 2, 3]
  assert fill(directory, images) == whole


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_units_whose_files_are_gone_are_made_again(directory, images, damage):
  whole = fill(directory, images)
  path = directory.path / "4.png"
  path.unlink()
  if damage == "shorter":
    path.write_bytes(b"c")
  assert to_do(directory, images) == [1]
  assert fill(directory, images) == whole
  assert to_do(directory, images) == []


def test_lines_of_a_unit_that_comes_out_differently_are_exchanged(
  directory, images
):
  fill(directory, images)
  for index in (0, 4, 5):
    (directory.path / f"{index}.png").unlink()
  with manifest.Manifest(directory, images) as opened:
    assert opened.units_to_do == [0, 1]
    opened.append(0, make_unit(directory, images, 0, "another content"))
    opened.append(1, make_unit(directory, images, 1, "c"))
    assert opened.units_to_do == []
  lines = (directory.path / "manifest.jsonl").read_text().splitlines()
  sizes = [json.loads(line)["bytes"] for line in lines]
  assert sizes == [15] * 3 + [1] * 3 + [7] * 4
  assert to_do(directory, images) == []


def test_units_with_failures_are_tried_again(directory, images):
  with manifest.Manifest(directory, images) as opened:
    lines = [{"index": i, "error": "NaN"} for i in images.indices(0)]
    opened.append(0, lines)
    assert opened.units_to_do == [1, 2, 3]  # not in the same process
    opened.append(1, make_unit(directory, images, 1))
  with manifest.Manifest(directory, images) as opened:
    assert opened.units_to_do == [0, 2, 3]
    assert opened.count() == (10, 3)
    opened.append(0, make_unit(directory, images, 0))
  assert to_do(directory, images) == [2, 3]


def test_hosts_have_their_own_manifests(directory, images):
  for host in range(3):
    fill(directory, images, host_index=host, num_hosts=3)
  names = sorted(n for n in os.listdir(directory.path) if n.endswith("jsonl"))
  assert names == [f"manifest-0000{i}-of-00003.jsonl" for i in range(3)]
  found = {
    json.loads(line)["index"]
    for name in names
    for line in (directory.path / name).read_text().splitlines()
  }
  assert found == set(range(10))


def test_only_one_process_writes(directory, images):
  with (
    manifest.Manifest(directory, images),
    pytest.raises(BlockingIOError, match="Another process is writing"),
  ):
    manifest.Manifest(directory, images)
  manifest.Manifest(directory, images).__exit__()


def test_temporary_files_of_a_killed_process_go_away(directory, images):
  directory.temporary("x").write_bytes(b"1")
  to_do(directory, images)
  assert not directory.temporary("x").exists()


def claim(directory, identity=None, *, new_files=(), overwrite=False, **values):
  return manifest.claim(
    directory,
    IDENTITY | (identity or {}),
    start=values.pop("start", {"available_bytes": 1, "left_out": []}),
    **values,
    new_files=new_files,
    overwrite=overwrite,
  )


def test_a_directory_belongs_to_one_run(directory):
  claim(directory)
  before = (directory.path / "run.json").read_bytes()
  (directory.path / "a.png").write_bytes(b"1")
  claim(directory, new_files=["a.png"])  # a restart
  with pytest.raises(
    FileExistsError, match=r"holds another run \(seed was 1, is 2\)"
  ):
    claim(directory, {"seed": 2})
  assert (directory.path / "run.json").read_bytes() == before


def test_what_a_run_began_with_stays(directory):
  begin = {"available_bytes": 5, "left_out": [{"item": 3, "images": 1}]}
  assert manifest.read_run(directory) is None
  run = claim(directory, start=begin)
  assert run == IDENTITY | begin | {"repairs": []}
  assert claim(directory) == run == manifest.read_run(directory)


def test_mended_lines_are_added_and_stay_as_they_are(directory):
  claim(directory)
  first = {"items": [3], "requests_sha256": "a"}
  second = {"items": [1], "requests_sha256": "b"}
  assert claim(directory, repairs=[first])["repairs"] == [first]
  assert claim(directory, repairs=[first, second])["repairs"] == [first, second]
  assert manifest.read_run(directory)["repairs"] == [first, second]
  changed = first | {"requests_sha256": "c"}
  with pytest.raises(FileExistsError, match="were mended have changed since"):
    claim(directory, repairs=[changed, second])


def test_files_of_others_are_not_overwritten(directory):
  (directory.path / "a.png").write_bytes(b"1")
  with pytest.raises(FileExistsError, match=r"a\.png exists; use another"):
    claim(directory, new_files=["b.png", "a.png"])
  assert os.listdir(directory.path) == ["a.png"]


@pytest.mark.parametrize("content", ["", "{", "[]", "3"])
def test_a_strange_run_json_is_refused(directory, content):
  (directory.path / "run.json").write_text(content)
  with pytest.raises(FileExistsError, match="is not from sample.py"):
    claim(directory)


def test_overwriting_removes_the_files_of_the_run_only(directory, images):
  claim(directory)
  fill(directory, images)
  path = directory.path
  outside = path.parent / "outside.png"
  outside.write_bytes(b"1")
  with (path / "manifest.jsonl").open("a") as file:
    file.write(json.dumps({"index": 10, "file": "../outside.png"}) + "\n")
    file.write('{"index": 11, "fi')
  (path / "mine.png").write_bytes(b"1")
  claim(directory, {"seed": 2}, overwrite=True)
  assert sorted(os.listdir(path)) == ["mine.png", "run.json"]
  assert outside.exists()
  assert json.loads((path / "run.json").read_text())["seed"] == 2


def test_a_run_that_is_under_way_is_not_overwritten(directory, images):
  claim(directory)
  with (
    manifest.Manifest(directory, images),
    pytest.raises(BlockingIOError, match="Another process"),
  ):
    claim(directory, overwrite=True)


def test_several_hosts_do_not_overwrite(directory):
  with pytest.raises(ValueError, match="--overwrite is for one host"):
    claim(directory, {"num_hosts": 2}, overwrite=True)
