"""No file is passed over in silence, whatever it is."""

import json
import uuid

import fsspec
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sana_jax import config as config_lib
from sana_jax.data import opening, records, scan, sources, storage
from sana_jax.data.sources import access, array_record
from tests import pictures


def write(root, names, content=b"x"):
  return pictures.write_folder(root, dict.fromkeys(names, content))


def test_pictures_that_are_not_read_are_named_with_their_kind(tmp_path, rng):
  image = pictures.encode(pictures.picture(rng))
  names = ("a.jpg", "sub/.hidden.jpg", ".cache/b.png", "._a.jpg", ".DS_Store")
  write(tmp_path, names, image)
  write(tmp_path, ("c.jxl", "c.txt", "d.HEIC", "e.svg", "README.md", "f.mp4"))
  source = sources.open_source(tmp_path)
  assert source.keys() == ["a"]
  expected = {
    "c.jxl": ".jxl",
    "d.HEIC": ".heic",
    "e.svg": ".svg",
    ".cache/b.png": "hidden",
    "sub/.hidden.jpg": "hidden",
  }
  assert dict(source.unread) == expected
  # c.txt is about a picture, though that is not read.
  assert source.orphans == ()
  assert source.others == ("README.md", "f.mp4")
  assert access.describe_unread(source) == (
    f"{tmp_path}: 5 pictures are not read: 1 .heic (such as d.HEIC), 1 .jxl "
    "(such as c.jxl), 1 .svg (such as e.svg), 2 hidden (such as .cache/b.png)"
  )
  pictures.write_tar(tmp_path / "t" / "0.tar", {"a.jpg": image, "c.jxl": b"x"})
  tars = sources.open_source(tmp_path / "t")
  assert dict(tars.unread) == {"0.tar:c.jxl": ".jxl"}
  (tmp_path / "t" / "0.tar").unlink()
  write(tmp_path / "good", ("a.jpg",), image)
  assert access.describe_unread(sources.open_source(tmp_path / "good")) is None


@pytest.mark.parametrize("suffix", ["ppm", "tiff", "jp2", "avif", "qoi", "tga"])
def test_what_pillow_reads_is_read(suffix, tmp_path, rng):
  image = pictures.picture(rng)
  image.save(tmp_path / f"a.{suffix}")
  (record,) = sources.open_source(tmp_path)
  assert record.key == "a"
  with PIL.Image.open(tmp_path / f"a.{suffix}") as found:
    assert found.size == image.size


@pytest.mark.parametrize(
  "value",
  [
    {"captions": [{"text": "a cat", "score": 27.5}]},
    {"prompt": 5},
    {"a": {"prompt": {"text": "a cat"}}},
  ],
)
def test_captions_of_an_unknown_form_are_named(value, tmp_path, rng):
  image = pictures.encode(pictures.picture(rng))
  files = {"a.jpg": image, "a.json": json.dumps(value).encode()}
  pictures.write_folder(tmp_path / "f", files)
  pictures.write_tar(tmp_path / "t" / "0.tar", files)
  for root in ("f", "t"):
    source = sources.open_source(tmp_path / root)
    with pytest.raises(
      ValueError, match="gives the caption '(captions|prompt)' as"
    ):
      source[0]
  with pytest.raises(ValueError, match=r"f/a\.json gives the caption"):
    sources.open_source(tmp_path / "f")[0]


def test_fields_beside_captions_may_hold_anything(tmp_path, rng):
  image = pictures.encode(pictures.picture(rng))
  value = {"prompt": "a cat", "_id": 7, "caption_model": 3, "width": [1, 2]}
  files = {"a.jpg": image, "a.json": json.dumps(value).encode()}
  (record,) = sources.open_source(pictures.write_folder(tmp_path, files))
  assert record.captions == (records.Caption("prompt", "a cat"),)


def test_a_table_of_a_shard_with_bare_texts_is_named(tmp_path, rng):
  image = pictures.encode(pictures.picture(rng))
  pictures.write_tar(tmp_path / "0.tar", {"d.jpg": image})
  (tmp_path / "0.json").write_text(json.dumps({"d": "a text"}))
  with pytest.raises(ValueError, match=r"0\.json describes 'd' by a JSON str"):
    sources.open_source(tmp_path)[0]


def test_a_csv_beside_pictures_is_read(tmp_path, rng):
  image = pictures.encode(pictures.picture(rng))
  write(tmp_path, ("d.jpg", "e.jpg"), image)
  table = (
    "\ufefffile_name,text,text_clip_score\r\n"
    'd.jpg,"a cat, of course",27.5\r\ngone.jpg,x,\r\n'
  )
  (tmp_path / "metadata.csv").write_text(table, newline="")
  source = sources.open_source(tmp_path)
  assert source[0].captions == (
    records.Caption("text", "a cat, of course", 27.5),
  )
  assert source[1].captions == ()
  assert source.orphans == ("gone.jpg in metadata.csv",)
  assert source.others == ()
  (tmp_path / "metadata.csv").write_text("id,text\n1,a\n")
  with pytest.raises(ValueError, match="line 2, has no file_name"):
    sources.open_source(tmp_path)
  (tmp_path / "metadata.csv").write_bytes(b"file_name,text\nd.jpg,\xff\n")
  with pytest.raises(ValueError, match=r"metadata\.csv is not UTF-8"):
    sources.open_source(tmp_path)


def scored_table(path, image):
  pq.write_table(
    pa.table(
      {
        "image": [image] * 3,
        "prompt": ["a", "b", "c"],
        "prompt_clip_score": [27.5, None, float("nan")],
        "long_caption": [["d", "e"], ["f"], ["g", "h"]],
        "long_caption_clip_score": [[1.0, 2.0], [3.0], [4.0, 5.0]],
      }
    ),
    path,
  )
  return sources.open_source(path)


def test_scores_in_a_table_belong_to_their_captions(tmp_path, rng):
  image = pictures.encode(pictures.picture(rng))
  source = scored_table(tmp_path / "x.parquet", image)
  found = [[(c.text, c.score) for c in r.captions] for r in source]
  assert found == [
    [("a", 27.5), ("d", 1.0), ("e", 2.0)],
    [("b", None), ("f", 3.0)],
    [("c", None), ("g", 4.0), ("h", 5.0)],
  ]
  table = pa.table(
    {"image": [image], "text": [["a", "b"]], "clip_score": [21.5]}
  )
  pq.write_table(table, tmp_path / "y.parquet")
  (record,) = sources.open_source(tmp_path / "y.parquet")
  assert [(c.text, c.score) for c in record.captions] == [
    ("a", 21.5),
    ("b", 21.5),
  ]
  for scores, message in (
    ([1.0], "has 2 captions 'text' and 1 scores: expected one for each"),
    (["x", "y"], "gives 'text_0' the score 'x': expected a number"),
  ):
    table = pa.table(
      {"image": [image], "text": [["a", "b"]], "text_clip_score": [scores]}
    )
    pq.write_table(table, tmp_path / "z.parquet")
    with pytest.raises(ValueError, match=message):
      sources.open_source(tmp_path / "z.parquet")[0]


def test_scores_beside_captions_in_json_are_read(tmp_path, rng):
  value = {"prompt": "a", "text": "b", "clip_score": 27, "text_clip_score": "9"}
  files = {
    "a.jpg": pictures.encode(pictures.picture(rng)),
    "a.json": json.dumps(value).encode(),
  }
  expected = (
    records.Caption("prompt", "a", 27.0),
    records.Caption("text", "b", 9.0),
  )
  folder = sources.open_source(pictures.write_folder(tmp_path / "f", files))
  pictures.write_tar(tmp_path / "t" / "0.tar", files)
  for source in (folder, sources.open_source(tmp_path / "t")):
    assert source[0].captions == source.captions(0) == expected


def low(source, minimum):
  found = scan.scan(source, num_threads=2, min_clip_score=minimum)
  return {i: p for i, p in enumerate(found.problem) if p is not None}


def test_pictures_with_a_low_score_are_left_out_with_the_reason(tmp_path, rng):
  image = pictures.encode(pictures.picture(rng))
  table = scored_table(tmp_path / "x.parquet", image)
  assert low(table, 27.5) == {}
  expected = {0: "the CLIP score of its prompt is below 27.6"}
  assert low(table, 27.6) == expected
  folder = tmp_path / "f"
  files = {"a.jpg": image, "a.json": b'{"text": "a", "clip_score": 20}'}
  pictures.write_folder(folder, {**files, "b.jpg": image, "b.json": b"{"})
  found = low(sources.open_source(folder), 22)
  assert found[0] == "the CLIP score of its prompt is below 22"
  assert "b.json is not JSON" in found[1]
  assert low(sources.open_source(folder), 0) == {}


def test_training_reports_what_the_score_leaves_out(tmp_path, rng):
  scored_table(tmp_path / "x.parquet", pictures.encode(pictures.picture(rng)))
  opened = opening.open_pictures(
    config_lib.DataConfig(path=str(tmp_path), min_clip_score=28.0),
    multiple=32,
    tokenize=lambda texts: {"length": np.array([len(t) for t in texts])},
    batch_size=2,
    seed=0,
  )
  (report,) = opened.reports
  assert (report.read, report.used) == (3, 2)
  assert dict(report.skipped) == {"the CLIP score of its prompt is below 28": 1}


@pytest.fixture
def damaged(tmp_path, rng):
  """A source of 40 records, two or three of which are overwritten."""
  items = [records.Record(f"r{i:02d}", rng.bytes(2000), ()) for i in range(40)]
  path = tmp_path / "x.array_record"
  array_record.write(str(path), items)
  content = bytearray(path.read_bytes())
  content[40_000:43_000] = b"\xff" * 3000
  path.write_bytes(content)
  return sources.open_source(path), items


def read(source, index):
  try:
    return source[index]
  except ValueError as error:
    return str(error)


def test_damage_in_an_array_record_costs_the_records_it_hits(damaged):
  source, items = damaged
  lost = [i for i, item in enumerate(items) if read(source, i) != item]
  assert 1 <= len(lost) <= 3
  for index in lost:
    assert "x.array_record is damaged" in read(source, index)
  with pytest.raises(ValueError, match="is damaged .*copy it again"):
    source.__getitems__([0, *lost])
  assert [source.key(index) for index in lost] == [
    items[index].key for index in lost
  ]


def test_braces_stand_for_ranges_and_words(tmp_path, rng):
  image = pictures.encode(pictures.picture(rng))
  for name in ("00008", "00009", "00010", "x"):
    pictures.write_tar(tmp_path / f"{name}.tar", {f"{name}.jpg": image})
  source = sources.open_source(f"{tmp_path}/{{00008..00010}}.tar")
  assert source.keys() == ["00008", "00009", "00010"]
  source = sources.open_source(f"{tmp_path}/{{x,0000*}}.tar")
  assert source.keys() == ["x", "00008", "00009"]
  with pytest.raises(FileNotFoundError, match=r"no tar file .*00011\.tar"):
    sources.open_source(f"{tmp_path}/{{00010..00011}}.tar")
  with pytest.raises(ValueError, match=r"the range \{3..1\}: expected the sm"):
    sources.open_source(f"{tmp_path}/{{3..1}}.tar")


def test_stores_that_cannot_be_used_say_why(monkeypatch):
  def missing(*_):
    raise ImportError("Please install s3fs to access S3")

  with pytest.raises(ValueError, match=r"nosuch://x: Protocol not known"):
    sources.open_source("nosuch://x")
  # s3fs may be installed here: what fsspec does without it is what is tested.
  monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
  with pytest.raises(
    ValueError, match=r"s3://x cannot be read: .*pip install sana_jax\[remote\]"
  ):
    sources.open_source("s3://x")


def test_a_store_is_written_and_knows_what_is_within(tmp_path):
  root = storage.Location.of(f"memory://{uuid.uuid4().hex}/a")
  (root / "b" / "c").write(b"content")
  assert (root / "b" / "c").read() == b"content"
  assert (root / "b").is_within(root)
  assert root.is_within(root)
  assert not root.is_within(root / "b")
  local = storage.Location.of(tmp_path / "a")
  assert not local.is_within(root)
  assert not storage.Location.of(tmp_path / "ab").is_within(local)
  (tmp_path / "a").mkdir()
  (tmp_path / "link").symlink_to(tmp_path / "a")
  assert storage.Location.of(tmp_path / "link" / "b").is_within(local)
