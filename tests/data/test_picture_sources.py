"""Every format yields the same records, and says what is wrong with it."""

import io
import json
import os
import pickle
import uuid
from concurrent import futures

import fsspec
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from sana_jax.data import records, scan, sources
from sana_jax.data.sources import array_record
from tests import pictures


@pytest.fixture
def contents(rng):
  return pictures.files(rng)


@pytest.fixture
def folder(tmp_path, contents):
  return pictures.write_folder(tmp_path / "folder", contents)


def open_as(kind, tmp_path, contents):
  folder = pictures.write_folder(tmp_path / "folder", contents)
  if kind == "folder":
    return sources.open_source(folder)
  if kind == "webdataset":
    pictures.write_tar(tmp_path / "tars" / "0.tar", contents)
    return sources.open_source(tmp_path / "tars")
  if kind == "wids":
    pictures.write_tar(tmp_path / "wids" / "0.tar", contents)
    meta = {"shardlist": [{"url": "0.tar", "nsamples": 4}]}
    (tmp_path / "wids" / "wids-meta.json").write_text(json.dumps(meta))
    return sources.open_source(tmp_path / "wids")
  if kind == "array_record":
    path = tmp_path / "records.array_record"
    array_record.write(str(path), sources.open_source(folder))
    return sources.open_source(path)
  table = tmp_path / "table" / "train-00000-of-00001.parquet"
  pictures.write_parquet(table, sources.open_source(folder))
  return sources.open_source(table.parent)


def test_a_folder_is_read_with_all_that_lies_beside_its_pictures(
  folder, contents
):
  source = sources.open_source(folder)
  found = {record.key: record for record in source}
  assert source.keys() == ["a.v2", "b/näh 猫", "c", "d"]
  assert found["a.v2"].captions == (
    records.Caption("prompt", "short", 27.5),
    records.Caption("long_caption", "a long one", 26.0),
  )
  assert found["b/näh 猫"].captions == (
    records.Caption("prompt", "first line second line"),
  )
  assert found["c"].captions == (
    records.Caption("prompt", ""),
    records.Caption("VILA", "nested"),
  )
  assert found["d"].captions == ()
  assert found["d"].image == contents["d.jpg"]
  assert source.orphans == ()


@pytest.mark.parametrize("kind", ["webdataset", "wids", "array_record"])
def test_formats_yield_the_same_records_as_a_folder(kind, tmp_path, contents):
  source = open_as(kind, tmp_path, contents)
  assert list(source) == list(sources.open_source(tmp_path / "folder"))


def test_parquet_yields_keys_pictures_and_captions(tmp_path, contents):
  source = open_as("parquet", tmp_path, contents)
  folder = list(sources.open_source(tmp_path / "folder"))
  assert source.keys() == [record.key for record in folder]
  assert [r.image for r in source] == [r.image for r in folder]
  for found, expected in zip(source, folder, strict=True):
    texts = {c.text for c in found.captions if c.text}
    assert texts == {c.text for c in expected.captions if c.text}


@pytest.mark.parametrize(
  "kind", ["folder", "webdataset", "wids", "parquet", "array_record"]
)
def test_random_access_pickles_and_threads_agree_with_order(
  kind, tmp_path, contents, rng
):
  source = open_as(kind, tmp_path, contents)
  in_order = [source[i] for i in range(len(source))]
  assert [record.key for record in in_order] == list(source.keys())
  order = rng.permutation(len(source)).tolist() * 3
  expected = [in_order[i] for i in order]
  copy = pickle.loads(pickle.dumps(source))
  assert copy.__getitems__(order) == expected
  assert copy[-1] == in_order[-1]
  with futures.ThreadPoolExecutor(4) as pool:
    assert list(pool.map(copy.__getitem__, order)) == expected
  with pytest.raises(IndexError, match="index 4 is outside the 4 records"):
    source[4]


def test_a_store_is_read_like_a_disk(contents):
  root = f"memory://{uuid.uuid4().hex}"
  for name, content in contents.items():
    with fsspec.open(f"{root}/{name}", "wb") as file:
      file.write(content)
  source = sources.open_source(root)
  assert source.keys() == pictures.stems(contents)
  assert source[3].image == contents["d.jpg"]
  assert source.image_head(3, 7) == contents["d.jpg"][:7]


@pytest.mark.parametrize(
  "kind", ["folder", "webdataset", "wids", "parquet", "array_record"]
)
def test_files_that_were_written_again_are_noticed(kind, tmp_path, contents):
  source = open_as(kind, tmp_path, contents)
  stamp = scan.stamp(source)
  assert scan.stamp(pickle.loads(pickle.dumps(source))) == stamp
  files = source.files()
  assert files
  stamps = {stamp}
  for file in files:
    os.utime(file.path, ns=(0, 0))
    stamps.add(scan.stamp(source))
  assert len(stamps) == 1 + len(files)
  if kind == "folder":
    assert {file.name for file in files} == {
      name.rpartition("/")[2] for name in contents
    }


def test_files_of_a_store_that_were_written_again_are_noticed(contents):
  root = f"memory://{uuid.uuid4().hex}"
  for name in ("a.png", "a.txt"):
    with fsspec.open(f"{root}/{name}", "wb") as file:
      file.write(contents["d.jpg"])
  source = sources.open_source(root)
  before = scan.stamp(source)
  assert scan.stamp(source) == before
  with fsspec.open(f"{root}/a.txt", "wb") as file:
    file.write(contents["d.jpg"])
  assert scan.stamp(source) != before


def test_long_names_in_tar_files_are_whole(tmp_path, contents):
  name = "x" * 240 + "/" + "猫" * 60
  path = pictures.write_tar(
    tmp_path / "0.tar", {f"{name}.jpg": contents["d.jpg"], f"{name}.txt": b"t"}
  )
  (record,) = sources.open_source(path)
  assert record.key == name
  assert record.captions == (records.Caption("prompt", "t"),)


def test_equal_keys_of_two_tar_files_get_their_names(tmp_path, contents):
  for shard in ("00", "01"):
    pictures.write_tar(tmp_path / f"{shard}.tar", {"d.jpg": contents["d.jpg"]})
  pattern = str(tmp_path / "*.tar")
  assert sources.open_source(pattern).keys() == ["00/d", "01/d"]


def test_files_about_a_tar_file_give_captions_and_scores(tmp_path, contents):
  pictures.write_tar(tmp_path / "0.tar", {"d.jpg": contents["d.jpg"]})
  for name, value in (
    ("0_VILA.5.json", {"d": {"prompt": "by VILA"}}),
    ("0_prompt_clip_score.json", {"d": {"_VILA_5": "21.25"}}),
    ("00_other.json", {"d": {"prompt": "of another shard"}}),
  ):
    (tmp_path / name).write_text(json.dumps(value))
  (record,) = sources.open_source(tmp_path)
  assert record.captions == (records.Caption("_VILA_5", "by VILA", 21.25),)


def test_hugging_face_tables_beside_pictures_are_read(tmp_path, contents):
  (tmp_path / "d.jpg").write_bytes(contents["d.jpg"])
  rows = [{"file_name": "d.jpg", "text": "a d"}, {"file_name": "gone.jpg"}]
  lines = "\n".join(map(json.dumps, rows))
  (tmp_path / "metadata.jsonl").write_text(lines)
  source = sources.open_source(tmp_path)
  assert source[0].captions == (records.Caption("text", "a d"),)
  assert source.orphans == ("gone.jpg in metadata.jsonl",)
  (tmp_path / "metadata.jsonl").write_text('{"text": "t"}')
  with pytest.raises(ValueError, match="line 1, has no file_name"):
    sources.open_source(tmp_path)


def test_the_bundled_emoji_are_a_tfds_data_set():
  source = sources.open_source(sources.emoji_path(), split="heldout")
  assert len(source) == 80
  assert source.keys()[79] == source[79].key == "heldout/79"
  (file,) = source.files()
  assert file.name.startswith("emoji")
  assert "heldout" in file.name
  assert "skin tone" in source[0].captions[0].text
  assert pickle.loads(pickle.dumps(source))[5] == source[5]
  assert source.__getitems__([7, 2]) == [source[7], source[2]]
  with pytest.raises(ValueError, match="no split 'test': expected one of held"):
    sources.open_source(sources.emoji_path(), split="test")


def test_splits_are_directories_or_files(tmp_path, contents):
  for split in ("train", "test"):
    pictures.write_folder(tmp_path / "f" / split, {"d.jpg": contents["d.jpg"]})
    table = pa.table({"image": [contents["d.jpg"]], "text": [split]})
    (tmp_path / "p").mkdir(exist_ok=True)
    pq.write_table(table, tmp_path / "p" / f"{split}-00000-of-00001.parquet")
  source = sources.open_source(tmp_path / "f", split="test")
  assert source.keys() == ["test/d"]
  source = sources.open_source(tmp_path / "p", split="test")
  assert source[0].captions[0].text == "test"
  with pytest.raises(ValueError, match="has the splits test, train"):
    sources.open_source(tmp_path / "p")
  with pytest.raises(ValueError, match="no split 'dev'"):
    sources.open_source(tmp_path / "f", split="dev")


def test_what_cannot_be_opened_is_named(tmp_path, folder, contents):
  with pytest.raises(FileNotFoundError, match="There is nothing at .*missing"):
    sources.open_source(tmp_path / "missing")
  with pytest.raises(ValueError, match="kind must be 'auto' or one of"):
    sources.open_source(folder, kind="zip")
  empty = tmp_path / "empty"
  empty.mkdir()
  with pytest.raises(FileNotFoundError, match="No data set in .*no files"):
    sources.open_source(empty)
  with pytest.raises(FileNotFoundError, match=r"No \.tar files in"):
    sources.open_source(folder, kind="webdataset")
  with pytest.raises(FileNotFoundError, match="No pictures in .*no files"):
    sources.open_source(empty, kind="folder")
  pictures.write_tar(folder / "x.tar", contents)
  with pytest.raises(ValueError, match="may be any of folder, webdataset"):
    sources.open_source(folder)
  with pytest.raises(ValueError, match="is a file: split='train'"):
    sources.open_source(folder / "x.tar", split="train")
  with pytest.raises(ValueError, match="is no directory"):
    sources.open_source(folder / "x.tar", kind="folder")


def test_broken_tar_files_are_named(tmp_path, contents):
  path = pictures.write_tar(tmp_path / "0.tar", contents)
  whole = path.read_bytes()
  path.write_bytes(whole[:900])
  with pytest.raises(ValueError, match=r"0\.tar"):
    sources.open_source(path)
  path.write_bytes(b"\x1f\x8b" + whole)
  with pytest.raises(ValueError, match="is compressed: expected a plain tar"):
    sources.open_source(path)
  path.write_bytes(np.random.default_rng(1).bytes(4096))
  with pytest.raises(ValueError, match="cannot be read as a tar file"):
    sources.open_source(path)


def test_broken_indices_are_named(tmp_path, contents):
  meta = tmp_path / "wids-meta.json"
  pictures.write_tar(tmp_path / "0.tar", contents)
  for value, message in (
    ({"shards": []}, 'has no "shardlist", only'),
    ({"shardlist": ["0.tar"]}, "lists '0.tar': expected"),
    (
      {"shardlist": [{"url": "0.tar", "nsamples": 5}]},
      "promises more records .* 5 promised, 4 with a picture",
    ),
  ):
    meta.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message):
      sources.open_source(tmp_path)
  meta.write_text(json.dumps({"shardlist": [{"url": "1.tar"}]}))
  with pytest.raises(FileNotFoundError, match=r"no tar file .*1\.tar"):
    sources.open_source(tmp_path)


def test_broken_tables_and_records_are_named(tmp_path, folder):
  bad = tmp_path / "bad.parquet"
  bad.write_bytes(b"not parquet at all")
  with pytest.raises(ValueError, match="is not a Parquet file"):
    sources.open_source(bad)
  pq.write_table(pa.table({"picture": [b"x"]}), bad)
  with pytest.raises(ValueError, match="has no column of pictures"):
    sources.open_source(bad)
  source = sources.open_source(folder)
  with pytest.raises(ValueError, match="must end with .array_record"):
    array_record.write(str(tmp_path / "x"), source)
  path = tmp_path / "x.array_record"
  with pytest.raises(ValueError, match="keys more than once"):
    array_record.write(str(path), [source[0], source[0]])
  with pytest.raises(ValueError, match="There are no records to write"):
    array_record.write(str(path), [])
  assert not list(tmp_path.glob("x*"))


def test_broken_descriptions_are_named_when_their_record_is_read(folder):
  (folder / "d.txt").write_bytes(b"\xff\xfe\x00")
  with pytest.raises(ValueError, match=r"d\.txt is not UTF-8"):
    sources.open_source(folder)[3]
  (folder / "d.txt").unlink()
  (folder / "d.json").write_text("{")
  with pytest.raises(ValueError, match=r"d\.json is not JSON"):
    sources.open_source(folder)[3]
  (folder / "d.json").write_text("[]")
  with pytest.raises(ValueError, match="holds a JSON list"):
    sources.open_source(folder)[3]
  (folder / "a.v2_clip_score.json").write_text('{"prompt": "good"}')
  with pytest.raises(ValueError, match="the score 'good': expected a finite"):
    sources.open_source(folder)[0]


def test_what_needs_a_disk_says_so():
  root = f"memory://{uuid.uuid4().hex}"
  for name in (
    "tfds/dataset_info.json",
    "tfds/features.json",
    "x.array_record",
  ):
    with fsspec.open(f"{root}/{name}", "wb") as file:
      file.write(b"{}")
  with pytest.raises(ValueError, match="TFDS data sets have random access"):
    sources.open_source(f"{root}/tfds")
  with pytest.raises(ValueError, match="ArrayRecord files have random access"):
    sources.open_source(f"{root}/x.array_record")


def test_array_records_of_others_are_refused(tmp_path):
  path = tmp_path / "x.array_record"
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  writer.write(b"\xc1 something else")
  writer.close()
  with pytest.raises(
    ValueError, match="does not end with an index of sana_jax"
  ):
    sources.open_source(path)
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  index = {"format": array_record.FORMAT, "version": 2, "keys": []}
  writer.write(msgpack.packb(index))
  writer.close()
  with pytest.raises(ValueError, match="has version 2"):
    sources.open_source(path)


class CaptionedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Two pictures with nested captions, and a text that is none."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, images, data_dir):
    self._images = images
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self):
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {
          "picture": tfds.features.Image(),
          "captions": tfds.features.Sequence({"text": text}),
          "file_name": text,
        }
      ),
    )

  def _split_generators(self, dl_manager):
    return {"whole": self._generate_examples()}

  def _generate_examples(self):
    for i, image in enumerate(self._images):
      texts = [{"text": f"{i} one"}, {"text": f"{i} two"}]
      yield (
        i,
        {
          "picture": io.BytesIO(image),
          "captions": texts,
          "file_name": f"{i}.png",
        },
      )


def test_a_tfds_data_set_has_the_captions_that_its_features_name(tmp_path, rng):
  images = [pictures.encode(pictures.picture(rng), "PNG") for _ in range(2)]
  builder = CaptionedBuilder(images, str(tmp_path))
  builder.download_and_prepare()
  source = sources.open_source(builder.data_dir)
  assert {record.image for record in source} == set(images)
  assert source.keys() == ["whole/0", "whole/1"]
  i = images.index(source[0].image)
  assert [(c.name, c.text) for c in source[0].captions] == [
    ("captions.text_0", f"{i} one"),
    ("captions.text_1", f"{i} two"),
  ]
  with pytest.raises(ValueError, match="hold.* TFDS data sets further down"):
    sources.open_source(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"No dataset_info\.json in"):
    sources.open_source(tmp_path, kind="tfds")


def test_a_table_may_name_files(tmp_path, contents):
  (tmp_path / "d.jpg").write_bytes(contents["d.jpg"])
  path = tmp_path / "x.parquet"
  pq.write_table(
    pa.table({"image_path": ["d.jpg", None], "caption": [["a", "b"], []]}), path
  )
  source = sources.open_source(path)
  assert source.keys() == ["x/0", "x/1"]
  assert source[0].image == contents["d.jpg"]
  assert [c.text for c in source[0].captions] == ["a", "b"]
  assert source.file_name(0) == "d.jpg"
  with pytest.raises(ValueError, match="Row 1 of .* neither bytes nor a path"):
    source[1]


def test_tables_that_differ_are_refused(tmp_path):
  for name, column in (("a", "text"), ("b", "other")):
    table = pa.table({"image": [b"x"], column: ["y"]})
    pq.write_table(table, tmp_path / f"{name}.parquet")
  with pytest.raises(
    ValueError, match=r"no columns \['text'\], as .*a.parquet"
  ):
    sources.open_source(tmp_path)
