"""Shards have the same bytes for the same images, and read back."""

import hashlib
import io
import json
import os
import tarfile
import time

import grain
import msgpack
import numpy as np
import PIL.Image
import pytest
from array_record.python import array_record_module

from sana_jax import images as images_lib
from sana_jax import storage
from sana_jax.bulk import sinks

SHARDS = ("webdataset", "arrayrecord")


def samples(rng, count=5):
  made = []
  for i in range(count):
    png = images_lib.encode_png(rng.random((8, 8, 3)).astype(np.float32))
    description = json.dumps({"prompt": f"ä {i}"}, ensure_ascii=False).encode()
    made.append(sinks.Sample(10 + i, f"A Prompt, {i}", png, description))
  return made


def sink(path, output_format):
  path.mkdir(exist_ok=True)
  return sinks.make_sink(
    output_format,
    storage.Directory(path),
    num_images=100,
    unit_name=lambda number: f"images-{number:05d}-of-00007",
  )


def write(path, output_format, some):
  writer = sink(path, output_format)(3)
  for sample in some:
    writer.add(sample)
  return writer.finish()


def digests(path):
  return {
    file.name: hashlib.sha256(file.read_bytes()).hexdigest()
    for file in path.iterdir()
  }


@pytest.mark.parametrize("output_format", sinks.FORMATS)
def test_the_same_images_make_the_same_bytes(tmp_path, rng, output_format):
  some = samples(rng)
  stored = write(tmp_path / "a", output_format, some)
  time.sleep(1.1)  # times in a file would differ
  assert write(tmp_path / "b", output_format, some) == stored
  assert digests(tmp_path / "a") == digests(tmp_path / "b")
  for place in stored:
    assert (tmp_path / "a" / place.file).stat().st_size == place.bytes


def test_png_files_are_named_by_number_and_prompt(tmp_path, rng):
  some = samples(rng)
  stored = write(tmp_path, "png", some)
  assert stored[2].file == "0012-a-prompt-2.png"
  assert stored[2].key is None
  for sample, place in zip(some, stored, strict=True):
    assert (tmp_path / place.file).read_bytes() == sample.png


def test_a_tar_shard_holds_png_and_json(tmp_path, rng):
  some = samples(rng)
  stored = write(tmp_path, "webdataset", some)
  assert {place.file for place in stored} == {"images-00003-of-00007.tar"}
  with tarfile.open(tmp_path / stored[0].file) as tar:
    names = tar.getnames()
    assert names[:2] == ["00000010.png", "00000010.json"]
    for sample, place in zip(some, stored, strict=True):
      png = tar.extractfile(f"{place.key}.png").read()
      assert png == sample.png
      assert PIL.Image.open(io.BytesIO(png)).size == (8, 8)
      assert tar.extractfile(f"{place.key}.json").read() == sample.description
    assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}


def test_an_array_record_shard_is_read_by_its_libraries(tmp_path, rng):
  some = samples(rng)
  stored = write(tmp_path, "arrayrecord", some)
  path = tmp_path / "images-00003-of-00007.array_record"
  expected = [
    {"__key__": place.key, "png": sample.png, "json": sample.description}
    for sample, place in zip(some, stored, strict=True)
  ]
  reader = array_record_module.ArrayRecordReader(str(path))
  assert [msgpack.unpackb(r) for r in reader.read_all()] == expected
  source = grain.sources.ArrayRecordDataSource(str(path))
  assert msgpack.unpackb(source[4]) == expected[4]


@pytest.mark.parametrize("output_format", SHARDS)
def test_an_unfinished_shard_has_no_name_and_goes_away(
  tmp_path, rng, output_format
):
  writer = sink(tmp_path, output_format)(0)
  writer.add(samples(rng)[0])
  assert all(name.startswith(".tmp-") for name in os.listdir(tmp_path))
  writer.discard()
  assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("output_format", SHARDS)
def test_a_unit_without_images_makes_no_shard(tmp_path, output_format):
  assert sink(tmp_path, output_format)(0).finish() == []
  assert os.listdir(tmp_path) == []


def test_slugs_are_file_names():
  assert sinks.slug("A  Cat, on/../the table_!") == "a-cat-on-the-table"
  assert sinks.slug("🍰") == "image"
  assert len(sinks.slug("word " * 50)) <= 60
  assert len(sinks.slug("漢字" * 50).encode()) <= 180
  assert sinks.png_name(5, "a", 10_000) == "0005-a.png"
  assert sinks.png_name(5, "a", 10_001) == "00005-a.png"
