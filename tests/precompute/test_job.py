"""Caches that are begun, continued, shared between hosts, and completed."""

import json
import time

import numpy as np
import PIL.Image
import pytest

from sana_jax import storage
from sana_jax.data import cache, cache_manifest, records
from sana_jax.data.sources import array_record
from sana_jax.precompute import finalise, job, report, task
from tests import pictures, tiny
from tests.precompute import sources

COUNT = 11


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  tokenizer = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(tokenizer)
  path = tmp_path_factory.mktemp("checkpoint")
  tiny.make_pipeline(tokenizer).save_pretrained(path)
  return path


def make_task(checkpoint, **changes) -> task.Task:
  values = {
    "source": "pictures",
    "checkpoint": str(checkpoint),
    "image_size": 32,
    "batch_size": 3,
    "records_per_shard": 4,
    "min_pictures": 1,
  }
  return task.Task(**values | changes)


@pytest.fixture(scope="module")
def prepared(checkpoint):
  what = make_task(checkpoint)
  source = sources.Pictures(COUNT, broken=[6])
  return job.assemble(
    what, source, source.sizes(), "f" * 64, what.load_encoders()
  )


def run(prepared, path, **options):
  return job.run(prepared, path, started=time.monotonic(), **options)


def contents(path) -> dict[str, bytes]:
  return {
    file.name: file.read_bytes()
    for file in path.iterdir()
    if not file.name.startswith(".lock")
  }


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
  path = tmp_path_factory.mktemp("whole")
  outcome = run(prepared, path)
  assert outcome.skipped == 1
  assert not outcome.stopped
  return path, outcome.completed


def test_a_finished_cache_is_read_in_the_order_of_the_source(prepared, whole):
  path, completed = whole
  source = cache.CachedSource(path)
  assert source.manifest == completed.manifest
  keys = [source[i].key for i in range(len(source))]
  assert keys == [f"p{i:03d}" for i in range(COUNT) if i != 6]
  for index in range(len(source)):
    bucket = source.manifest.settings.buckets[source.buckets[index]]
    assert source[index].size == bucket
    assert source[index].latents.shape == (bucket[0] // 4, bucket[1] // 4, 4)
  expected = prepared.maker.encoders.null_caption()
  np.testing.assert_array_equal(source.null_caption(), expected)
  assert list(source.manifest.skipped) == ["p006"]


def test_the_manifest_says_what_was_used(prepared, whole):
  manifest = whole[1].manifest
  encoders = prepared.maker.encoders
  manifest.check(
    **encoders.identity,
    image_size=32,
    crop="center",
    resample="bicubic",
    source_fingerprint="f" * 64,
  )
  assert manifest.source == "pictures"
  assert manifest.versions.keys() == {"jax", "sana_jax"}
  assert "1 pictures skipped: p006: " in finalise.describe(manifest)
  assert "10 records in 3 shards" in finalise.describe(manifest)


def test_a_finished_cache_is_left_as_it_is(prepared, whole):
  path, _ = whole
  before = contents(path)
  times = {p.name: p.stat().st_mtime_ns for p in path.glob("shard*")}
  assert run(prepared, path).skipped == 1
  assert contents(path) == before
  assert times == {p.name: p.stat().st_mtime_ns for p in path.glob("shard*")}


def test_what_is_missing_is_made_again_with_the_same_bytes(
  prepared, whole, tmp_path
):
  expected = contents(whole[0])
  run(prepared, tmp_path)
  (tmp_path / "shard-00001-of-00003.array_record").unlink()
  (tmp_path / "shard-00002-of-00003.json").unlink()
  (tmp_path / ".tmp-00000-shard").write_bytes(b"half")
  (tmp_path / cache_manifest.MANIFEST).unlink()
  run(prepared, tmp_path)
  assert contents(tmp_path) == expected


def test_hosts_make_what_one_makes_and_the_last_completes_it(
  prepared, whole, tmp_path
):
  first = run(prepared, tmp_path, num_hosts=2, host_index=1)
  assert first.completed is None
  assert first.skipped == 1
  with pytest.raises(
    finalise.UnfinishedError,
    match="3 of 3|2 of 3|shard-00000-of-00003.*shard-00002.*null_caption",
  ):
    finalise.finalise(storage.Directory(tmp_path))
  second = run(prepared, tmp_path, num_hosts=2, host_index=0)
  assert second.completed.manifest == whole[1].manifest
  assert contents(tmp_path) == contents(whole[0])


def test_the_number_of_hosts_may_change(prepared, whole, tmp_path):
  run(prepared, tmp_path, num_hosts=3, host_index=2)
  assert len(list(tmp_path.glob("*.array_record"))) == 1
  run(prepared, tmp_path)
  assert contents(tmp_path) == contents(whole[0])


def test_another_cache_in_the_directory_is_refused(prepared, checkpoint, whole):
  maker = prepared.maker
  other = job.assemble(
    make_task(checkpoint, max_buckets=1),
    maker.source,
    maker.source.sizes(),
    "0" * 64,
    maker.encoders,
  )
  with pytest.raises(
    FileExistsError, match="buckets was .*; source_fingerprint was .* another"
  ):
    run(other, whole[0])


def test_a_second_process_of_a_host_is_refused(prepared, tmp_path):
  file = storage.open_alone(tmp_path / ".lock-00000", "wait")
  with file, pytest.raises(BlockingIOError, match="Another process is writing"):
    run(prepared, tmp_path)


def test_pictures_are_compared_with_what_their_latents_decode_to(
  prepared, whole, tmp_path
):
  path, completed = whole
  compared = report.compare(
    prepared.maker, cache.CachedSource(path), completed.finished, 6
  )
  assert len({each.key for each in compared}) == 6
  for each in compared:
    error = each.picture.astype(float) - each.decoded.astype(float)
    expected = 20 * np.log10(255 / np.sqrt(np.mean(error**2)))
    assert each.psnr == pytest.approx(expected)
    record = prepared.maker.source[int(each.key[1:])]
    picture = prepared.maker.fit(record, each.shape)
    np.testing.assert_array_equal(each.picture, picture)
  report.write(storage.Directory(tmp_path), completed.manifest, compared)
  values = json.loads((tmp_path / report.REPORT).read_text())
  assert values["skipped"].keys() == {"p006"}
  found = values["reconstruction"]["psnr_by_bucket"]
  assert sum(each["count"] for each in found.values()) == 6
  assert min(each["min"] for each in found.values()) == min(
    each.psnr for each in compared
  )
  assert values["bytes_per_latent"] == 2 * np.mean(
    [np.prod(record.latents.shape) for record in all_records(path)]
  )
  with PIL.Image.open(tmp_path / report.WORST) as sheet:
    assert sheet.size == (6 * 256, 2 * 256)


def all_records(path):
  source = cache.CachedSource(path)
  return source.__getitems__(list(range(len(source))))


def test_a_source_that_has_changed_is_noticed_when_comparing(prepared, whole):
  path, completed = whole
  changed = sources.Pictures(COUNT)
  changed.records.reverse()
  with pytest.raises(ValueError, match="the source has changed"):
    report.compare(
      prepared.maker._replace(source=changed),
      cache.CachedSource(path),
      completed.finished,
      4,
    )


def test_equal_pictures_have_a_psnr_of_100(rng):
  picture = rng.integers(0, 256, (8, 8, 3), np.uint8)
  assert report.psnr(picture, picture) == 100
  assert report.psnr(picture, picture ^ 1) == pytest.approx(48.1308, abs=1e-3)


@pytest.mark.parametrize(
  ("side", "resample", "expected"),
  [
    (1024, "auto", "bicubic"),
    (2048, "auto", "lanczos"),
    (4096, "auto", "bicubic"),
    (512, "lanczos", "lanczos"),
  ],
)
def test_the_filter_is_that_of_the_reference(side, resample, expected):
  what = make_task("x", image_size=side, resample=resample)
  assert what.filter == expected


def test_a_folder_of_broken_files_becomes_a_cache(checkpoint, tmp_path, rng):
  files, _ = pictures.planted(rng)
  pictures.write_folder(tmp_path / "planted", files)
  prepared = job.prepare(
    task.Task(
      source=str(tmp_path / "planted"),
      checkpoint=str(checkpoint),
      image_size=32,
      buckets="square",
    )
  )
  outcome = job.run(prepared, tmp_path / "cache", started=time.monotonic())
  assert outcome.skipped == 4
  source = cache.CachedSource(tmp_path / "cache")
  assert len(source) == len(prepared.maker.source) - 4
  reasons = source.manifest.skipped
  assert reasons.keys() == {"garbled", "no_image", "truncated", "zero"}
  assert "garbled.txt is not UTF-8" in reasons["garbled"]


def compared(psnr, key="a"):
  picture = np.full((8, 8, 3), 7, np.uint8)
  return report.Compared(key, (8, 8), psnr, picture, picture)


def test_an_autoencoder_that_does_not_know_the_pictures_is_warned_of(
  whole, tmp_path
):
  good, bad = [compared(24.0)], [compared(24.0), compared(11.0, "b")]
  assert report.verdict([], "emoji") is None
  assert report.verdict(good, "emoji") is None
  text = report.verdict(bad, "emoji")
  assert "autoencoder of emoji does not know such pictures" in text
  assert "17.5 dB on average, less than 20" in text
  assert not report.is_compared(tmp_path)
  directory = storage.Directory(tmp_path)
  report.write(directory, whole[1].manifest, [])
  assert not report.is_compared(tmp_path)
  report.write(directory, whole[1].manifest, bad)
  assert report.is_compared(tmp_path)
  values = json.loads((tmp_path / report.REPORT).read_text())
  assert "does not know such pictures" in values["warning"]
  assert values["reconstruction"]["mean"] == 17.5
  (tmp_path / report.REPORT).write_text("{")
  with pytest.raises(ValueError, match=r"report\.json is no report .*delete"):
    report.is_compared(tmp_path)


def test_an_output_in_a_store_is_refused(tmp_path):
  assert task.output_directory(str(tmp_path)) == tmp_path
  with pytest.raises(
    ValueError, match="--output=gs://x/y is not on a disk; .*gcsfuse"
  ):
    task.output_directory("gs://x/y")


def test_pictures_with_a_low_score_are_skipped_and_said(
  checkpoint, tmp_path, rng
):
  files = {}
  for name, score in (("bad", 20), ("good", 25), ("unknown", None)):
    files[f"{name}.jpg"] = pictures.encode(pictures.picture(rng))
    value = {"prompt": name, "clip_score": score}
    files[f"{name}.json"] = json.dumps(value).encode()
  files["c.jxl"] = b"x"
  folder = pictures.write_folder(tmp_path / "f", files)
  what = make_task(checkpoint, source=str(folder), min_clip_score=22.0)
  outcome = run(job.prepare(what), tmp_path / "cache")
  assert outcome.completed.manifest.skipped == {
    "bad": "the CLIP score of its prompt is below 22"
  }
  other = make_task(checkpoint, source=str(folder))
  with pytest.raises(FileExistsError, match="source_fingerprint was"):
    run(job.prepare(other), tmp_path / "cache")


def test_damaged_records_are_skipped_by_name(checkpoint, tmp_path, rng):
  items = [
    records.Record(f"r{i:02d}", sources.png(rng, 40, 40), ()) for i in range(9)
  ]
  path = tmp_path / "x.array_record"
  array_record.write(str(path), items)
  content = bytearray(path.read_bytes())
  start = content.index(items[4].image[40:60])
  content[start : start + 100] = b"\xff" * 100
  path.write_bytes(content)
  what = make_task(checkpoint, source=str(path))
  outcome = run(job.prepare(what), tmp_path / "cache")
  ((key, why),) = outcome.completed.manifest.skipped.items()
  assert key == "r04"
  assert "x.array_record is damaged" in why
