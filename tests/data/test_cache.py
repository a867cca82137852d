"""Cached latents and text states: bytes, manifest, random access."""

import dataclasses
import itertools
import json
import pickle

import grain
import ml_dtypes
import numpy as np
import pytest

from sana_jax import config as config_lib
from sana_jax import storage
from sana_jax.data import (
  cache,
  cache_manifest,
  cache_records,
  loader,
  opening,
)

SETTINGS = cache_manifest.Settings(
  image_size=64,
  buckets=((64, 64), (32, 128)),
  crop="center",
  resample="bicubic",
  autoencoder_sha256="a" * 64,
  scaling_factor=0.41407,
  compression=32,
  latent_channels=3,
  tile=None,
  text_encoder_sha256="b" * 64,
  tokenizer_sha256="c" * 64,
  instruction_sha256="d" * 64,
  max_sequence_length=7,
  lowercase=True,
  text_width=5,
  dtype="float32",
  batch_size=4,
  records_per_shard=3,
  source_fingerprint="e" * 64,
)


def bfloat16(rng, *shape):
  return rng.normal(size=shape).astype(ml_dtypes.bfloat16)


def random_record(rng, index: int, *, text: bool = True):
  captions = tuple(
    cache_records.Caption(
      name,
      f"caption {index} of {name}, ünïcode",
      score,
      bfloat16(rng, int(rng.integers(1, 8)), 5) if text else None,
    )
    for name, score in (("prompt", None), ("vila", 27.1))[: index % 3]
  )
  height, width = SETTINGS.buckets[index % 2]
  return cache_records.Record(
    f"key-{index}",
    (height, width),
    bfloat16(rng, height // 32, width // 32, 3),
    captions,
  )


def assert_same(ours, theirs):
  assert ours.key == theirs.key
  assert ours.size == theirs.size
  assert ours.latents.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(ours.latents, theirs.latents)
  assert len(ours.captions) == len(theirs.captions)
  for a, b in zip(ours.captions, theirs.captions, strict=True):
    assert a[:3] == b[:3]
    assert a.length == b.length
    if b.states is not None:
      np.testing.assert_array_equal(a.states, b.states)


def write_cache(path, records, **changes):
  """Writes shards of three, as the precompute does, without its models."""
  directory = storage.Directory(path)
  shards = []
  for number in range(0, len(records), 3):
    name = f"shard-{number // 3:05d}.array_record"
    file = storage.RecordFile(path / name, path / name)
    for record in records[number : number + 3]:
      file.write(cache_records.encode(record))
    file.close()
    shards.append(
      cache_manifest.Shard(
        file=name,
        bytes=(path / name).stat().st_size,
        sha256="f" * 64,
        records=len(records[number : number + 3]),
        skipped={"broken": "no picture"} if number == 3 else {},
        captions=1,
        truncated_captions=0,
        latent_bytes=1,
        text_bytes=1,
      )
    )
  numbers = [SETTINGS.buckets.index(record.size) for record in records]
  np.save(path / cache.BUCKETS, np.asarray(numbers, np.uint16))
  manifest = cache_manifest.Manifest(
    settings=dataclasses.replace(SETTINGS, **changes),
    checkpoint="tiny",
    source="pictures",
    shards=tuple(shards),
    versions={"sana_jax": "0"},
  )
  directory.write(cache_manifest.MANIFEST, manifest.to_json().encode())
  return manifest


@pytest.mark.parametrize("text", [True, False])
def test_a_record_survives_its_bytes(rng, text):
  for index in range(6):
    record = random_record(rng, index, text=text)
    assert_same(cache_records.decode(cache_records.encode(record)), record)


def test_a_record_of_another_kind_is_refused(rng):
  content = cache_records.encode(random_record(rng, 1))
  with pytest.raises(ValueError, match="begins with b'\\\\x89PNG'"):
    cache_records.decode(b"\x89PNG" + content[4:])
  with pytest.raises(ValueError, match="'key-1' has .* bytes, expected"):
    cache_records.decode(content[:-2])


def test_records_are_read_by_number_in_batches_and_by_grain(rng, tmp_path):
  records = [random_record(rng, index) for index in range(8)]
  manifest = write_cache(tmp_path, records)
  source = cache.CachedSource(tmp_path)
  assert source.manifest == manifest
  assert len(source) == 8
  for index, record in enumerate(records):
    assert_same(source[index], record)
    assert SETTINGS.buckets[source.buckets[index]] == record.size
  wanted = [7, 0, 3, 3, 5]
  for record, index in zip(source.__getitems__(wanted), wanted, strict=True):
    assert_same(record, records[index])
  again = pickle.loads(pickle.dumps(source))
  assert_same(again[6], records[6])
  dataset = grain.MapDataset.source(source).seed(0).shuffle()
  assert {dataset[i].key for i in range(8)} == {r.key for r in records}


def test_the_manifest_survives_its_json_and_counts(rng, tmp_path):
  manifest = write_cache(tmp_path, [random_record(rng, i) for i in range(8)])
  assert cache_manifest.Manifest.read(tmp_path) == manifest
  assert manifest.records == 8
  assert manifest.skipped == {"broken": "no picture"}
  assert manifest.has_text


def test_the_null_caption_is_read_with_its_padding(rng, tmp_path):
  write_cache(tmp_path, [random_record(rng, 0)])
  states = bfloat16(rng, 7, 5)
  np.save(tmp_path / cache.NULL_CAPTION, states.view(np.uint16))
  found = cache.CachedSource(tmp_path).null_caption()
  assert found.dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(found, states)


def test_latents_alone_have_no_null_caption(rng, tmp_path):
  write_cache(
    tmp_path, [random_record(rng, 0, text=False)], text_encoder_sha256=None
  )
  with pytest.raises(ValueError, match="has no text states.*latents_only"):
    cache.CachedSource(tmp_path).null_caption()


def test_training_accepts_the_cache_that_fits(rng, tmp_path):
  manifest = write_cache(tmp_path, [random_record(rng, 0)])
  manifest.check(**dataclasses.asdict(SETTINGS))


@pytest.mark.parametrize(
  "name", [field.name for field in dataclasses.fields(SETTINGS)]
)
def test_training_refuses_a_cache_that_differs_and_names_the_field(
  rng, tmp_path, name
):
  manifest = write_cache(tmp_path, [random_record(rng, 0)])
  expected = dataclasses.asdict(SETTINGS)
  expected[name] = "another"
  with pytest.raises(ValueError, match="does not fit") as error:
    manifest.check(**expected)
  assert f"{name} is {getattr(SETTINGS, name)!r}" in str(error.value)
  assert str(error.value).count("training needs") == 1


def test_all_differences_are_named_at_once(rng, tmp_path):
  manifest = write_cache(tmp_path, [random_record(rng, 0)])
  with pytest.raises(
    ValueError, match="lowercase is True, .*max_sequence_length is 7, tra"
  ):
    manifest.check(image_size=64, lowercase=False, max_sequence_length=300)


def test_a_setting_that_caches_do_not_have_is_a_slip(rng, tmp_path):
  manifest = write_cache(tmp_path, [random_record(rng, 0)])
  with pytest.raises(TypeError, match="no settings of a cache: .'chi'."):
    manifest.check(chi="x")


def test_an_unfinished_cache_is_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="has no manifest.json.*finish"):
    cache.CachedSource(tmp_path)


def test_missing_and_shortened_shards_are_named(rng, tmp_path):
  write_cache(tmp_path, [random_record(rng, index) for index in range(8)])
  (tmp_path / "shard-00000.array_record").unlink()
  path = tmp_path / "shard-00002.array_record"
  path.write_bytes(path.read_bytes()[:-9])
  with pytest.raises(FileNotFoundError, match="00000.*no bytes.*00002.*2 in"):
    cache.CachedSource(tmp_path)


def test_buckets_of_other_records_are_refused(rng, tmp_path):
  write_cache(tmp_path, [random_record(rng, index) for index in range(4)])
  np.save(tmp_path / cache.BUCKETS, np.zeros(5, np.uint16))
  with pytest.raises(ValueError, match="describes 5 records, the manifest 4"):
    cache.CachedSource(tmp_path)


def test_a_cache_without_records_is_refused(tmp_path):
  write_cache(tmp_path, [])
  with pytest.raises(ValueError, match="has no records"):
    cache.CachedSource(tmp_path)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda values: values.update(format=9), "format 9, expected 1"),
    (lambda values: values.pop("shards"), "'shards'"),
    (lambda values: values["settings"].pop("crop"), r"lack \['crop'\]"),
    (lambda values: values["settings"].update(x=1), r"have \['x'\] too many"),
    (lambda values: values["shards"][0].pop("bytes"), "bytes"),
  ],
)
def test_a_broken_manifest_is_refused(rng, tmp_path, change, message):
  write_cache(tmp_path, [random_record(rng, 0)])
  file = tmp_path / cache_manifest.MANIFEST
  values = json.loads(file.read_text())
  change(values)
  file.write_text(json.dumps(values))
  with pytest.raises(ValueError, match=f"no manifest of cached.*{message}"):
    cache_manifest.Manifest.read(tmp_path)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_shard_is_named_in_training_too(rng, tmp_path, threads):
  records = [random_record(rng, index) for index in range(9)]
  write_cache(tmp_path, records)
  null = bfloat16(rng, 7, 5)
  np.save(tmp_path / cache.NULL_CAPTION, null.view(np.uint16))
  shard = tmp_path / "shard-00001.array_record"
  content = bytearray(shard.read_bytes())
  content[content.index(b"key-4")] ^= 1
  shard.write_bytes(content)
  source = cache.CachedSource(tmp_path)
  assert source[0].key == "key-0"
  message = r"shard-00001\.array_record is damaged .*; copy it again"
  with pytest.raises(ValueError, match=message):
    source[4]
  config = config_lib.DataConfig(cache=str(tmp_path))
  opened = opening.open_cache(source, config, batch_size=1, seed=0)
  batches = opened.batches(loader.Host(num_threads=threads), 0)
  with pytest.raises(ValueError, match=message):
    list(itertools.islice(batches, 9))


def test_a_cache_in_a_store_is_refused():
  with pytest.raises(ValueError, match="gs://b/c is not on a local disk"):
    cache.CachedSource("gs://b/c")
