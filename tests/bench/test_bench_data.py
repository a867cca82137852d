"""The benchmark of reading, on a small cache."""

import json

import pytest

from bench import data
from tests import caches
from tests.precompute import sources


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint")
  caches.make_checkpoint(path)
  made = tmp_path_factory.mktemp("cache")
  caches.make_cache(made, path, sources.Pictures(20), 32)
  return made


def test_a_table_and_a_record_are_made(cache, tmp_path, capsys):
  file = tmp_path / "speed.json"
  code = data.main(
    [
      *(f"--cache={cache}", "--batch_size=8", "--threads=0,2"),
      *("--seconds=0.05", f"--json={file}", "--chip=v5e"),
    ]
  )
  assert code == 0
  lines = capsys.readouterr().out.splitlines()
  # 0.4 * 197e12 / (4 * 2.967e12), by hand.
  assert lines[0].startswith("v5e trains sana_1600m on 6.6 images/s per chip")
  found = json.loads(file.read_text())
  assert found["images_per_second_needed"] == pytest.approx(6.64, rel=2e-3)
  assert [speed["num_threads"] for speed in found["speeds"]] == [0, 2]
  for line, speed in zip(lines[2:], found["speeds"], strict=True):
    assert speed["images_per_second"] > 0
    assert speed["megabytes_per_second"] > 0
    chips = speed["images_per_second"] / found["images_per_second_needed"]
    assert float(line.split()[-1]) == pytest.approx(chips, abs=0.01)
  assert found["options"]["chip"] == "v5e"
  assert found["machine"]["cores"] > 0


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
  assert data.main([f"--cache={tmp_path}"]) == 1
  error = capsys.readouterr().err
  assert error.startswith("bench.data: ")
  assert "has no manifest.json" in error
  assert error.count("\n") == 1
