"""The benchmark of reading, on a small cache."""

import dataclasses
import json

import pytest

from bench import data
from sana_jax import config as config_lib
from sana_jax import flops
from sana_jax.data import cache_manifest
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
  found = json.loads(file.read_text())
  needed = found["images_per_second_needed"]
  assert lines[0] == (
    f"v5e trains sana_1600m on {needed:.1f} images/s per chip at 32 pixels, "
    "40% of its peak"
  )
  forward = flops.forward(config_lib.sana_1600m(), 32, 32)
  training = flops.training(forward, remat="full")
  assert needed == pytest.approx(0.4 * 197e12 / training)
  assert [speed["num_threads"] for speed in found["speeds"]] == [0, 2]
  for line, speed in zip(lines[2:], found["speeds"], strict=True):
    assert speed["images_per_second"] > 0
    assert speed["megabytes_per_second"] > 0
    chips = speed["images_per_second"] / found["images_per_second_needed"]
    assert float(line.split()[-1]) == pytest.approx(chips, abs=0.01)
  assert found["options"]["chip"] == "v5e"
  assert found["machine"]["cores"] > 0


def test_what_a_chip_needs_at_1024_pixels_is_as_by_hand():
  args = data._parse(["--path=x", "--image_size=1024", "--chip=v5e"])
  # 0.4 * 197e12 / (4 * 2.967e12).
  assert data.images_per_second(args) == pytest.approx(6.64, rel=2e-3)


def test_a_cache_of_another_size_or_without_texts_is_refused(
  cache, tmp_path, capsys
):
  assert data.main([f"--cache={cache}", "--image_size=1024"]) == 1
  error = capsys.readouterr().err
  assert "--image_size is 1024, but" in error
  assert "was made at 32 pixels" in error
  made = tmp_path / "latents"
  made.mkdir()
  for file in cache.iterdir():
    if file.is_file():
      (made / file.name).write_bytes(file.read_bytes())
  manifest = cache_manifest.Manifest.read(cache)
  settings = dataclasses.replace(manifest.settings, text_encoder_sha256=None)
  latents = dataclasses.replace(manifest, settings=settings)
  (made / cache_manifest.MANIFEST).write_text(latents.to_json())
  assert data.main([f"--cache={made}"]) == 1
  assert "has no text states" in capsys.readouterr().err


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
  assert data.main([f"--cache={tmp_path}"]) == 1
  error = capsys.readouterr().err
  assert error.startswith("bench.data: ")
  assert "has no manifest.json" in error
  assert error.count("\n") == 1
