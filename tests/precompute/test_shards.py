"""Shards: what they hold, what they leave out, and that they repeat."""

import dataclasses
import errno
import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sana_jax import storage, text
from sana_jax.data import (
  cache,
  cache_manifest,
  cache_records,
  transforms,
)
from sana_jax.models import tiling
from sana_jax.precompute import encoders as encoders_lib
from sana_jax.precompute import finalise, shards
from sana_jax.precompute import plan as plan_lib
from tests import tiny
from tests.precompute import sources

SIDE = 32
PER_SHARD = 5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  tokenizer = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(tokenizer)
  path = tmp_path_factory.mktemp("checkpoint")
  tiny.make_pipeline(tokenizer).save_pretrained(path)
  return path


@jax.jit
def jitted_encode(autoencoder, images):
  return autoencoder.encode(images)


def load(checkpoint, **changes):
  options = {"dtype": "float32", "tile": None, "batch_size": 3} | changes
  return encoders_lib.load(checkpoint, **options)


@pytest.fixture(scope="module")
def encoders(checkpoint):
  return load(checkpoint)


def make_plan(source, problems=None, **changes):
  return plan_lib.make_plan(
    source.sizes(problems),
    **{
      "kind": "aspect",
      "image_size": SIDE,
      "multiple": 4,
      "max_buckets": 40,
      "min_pictures": 1,
      "records_per_shard": PER_SHARD,
      "batch_size": 3,
    }
    | changes,
  )


def make_maker(source, encoders, problems=None, **changes):
  plan = make_plan(source, problems, **changes)
  settings = cache_manifest.Settings(
    image_size=SIDE,
    buckets=plan.shapes,
    crop="center",
    resample="bicubic",
    records_per_shard=PER_SHARD,
    source_fingerprint="f" * 64,
    **encoders.identity,
  )
  return shards.Maker(source, plan, encoders, settings)


def read(path, finished) -> list[cache_records.Record]:
  from array_record.python import array_record_module  # noqa: PLC0415

  reader = array_record_module.ArrayRecordReader(
    str(path / finished.shard.file)
  )
  return [cache_records.decode(c) for c in reader.read_all()]


def test_a_shard_holds_what_the_models_make_of_its_pictures(
  encoders, checkpoint, tmp_path
):
  source = sources.Pictures(8)
  maker = make_maker(source, encoders)
  finished = maker.make(1, storage.Directory(tmp_path))
  found = read(tmp_path, finished)
  assert [record.key for record in found] == ["p005", "p006", "p007"]
  for record, index in zip(found, finished.indices, strict=True):
    shape = maker.plan.shapes[maker.plan.bucket_of[index]]
    assert record.size == shape
    picture = transforms.fit(
      transforms.decode(source[index].image), *shape, resample="bicubic"
    )
    images = picture[None].astype(np.float32) / 127.5 - 1
    expected = jitted_encode(encoders.autoencoder, images)[0] * 0.4
    assert record.latents.dtype == ml_dtypes.bfloat16
    # A bfloat16 has 8 bits.
    np.testing.assert_allclose(
      record.latents.astype(np.float32), expected, rtol=2**-8, atol=1e-3
    )
    assert_captions_are_encoded(record, source[index], encoders)


def assert_captions_are_encoded(record, original, encoders):
  assert [c[:3] for c in record.captions] == [
    (c.name, c.text, c.score) for c in original.captions
  ]
  for caption in record.captions:
    states, mask = text.encode_prompts(
      encoders.text.model,
      encoders.text.tokenizer,
      [caption.text],
      complex_human_instruction=tiny.INSTRUCTION,
      max_sequence_length=tiny.LENGTH,
    )
    assert caption.length == int(mask.sum()) > 1
    assert caption.states.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(
      caption.states.astype(np.float32),
      states[0][: caption.length],
      rtol=2**-8,
      atol=1e-3,
    )


def test_a_shard_made_again_has_the_same_bytes(encoders, checkpoint, tmp_path):
  source = sources.Pictures(8, broken=[2])
  contents = []
  for name, models in (("a", encoders), ("b", load(checkpoint))):
    path = tmp_path / name
    path.mkdir()
    maker = make_maker(source, models)
    for number in (1, 0) if name == "b" else (0, 1):
      maker.make(number, storage.Directory(path))
    contents.append({p.name: p.read_bytes() for p in path.iterdir()})
  assert contents[0] == contents[1]
  assert set(contents[0]) == {
    "shard-00000-of-00002.array_record",
    "shard-00000-of-00002.json",
    "shard-00001-of-00002.array_record",
    "shard-00001-of-00002.json",
    cache.NULL_CAPTION,
  }


def test_the_description_of_a_shard_is_true(encoders, tmp_path):
  maker = make_maker(sources.Pictures(5), encoders)
  finished = maker.make(0, storage.Directory(tmp_path))
  found = read(tmp_path, finished)
  content = (tmp_path / finished.shard.file).read_bytes()
  assert finished.shard.bytes == len(content)
  assert finished.shard.sha256 == hashlib.sha256(content).hexdigest()
  assert finished.shard.records == len(found) == 5
  captions = [c for record in found for c in record.captions]
  assert finished.shard.captions == len(captions)
  assert finished.shard.text_bytes == sum(c.states.nbytes for c in captions)
  assert finished.shard.latent_bytes == sum(r.latents.nbytes for r in found)
  assert maker.find(0, tmp_path) == finished


def test_unusable_pictures_are_left_out_and_named(encoders, tmp_path):
  source = sources.Pictures(5, broken=[3])
  maker = make_maker(source, encoders, {1: "no header"})
  done = []
  maker = maker._replace(on_batch=done.append)
  finished = maker.make(0, storage.Directory(tmp_path))
  assert finished.indices == (0, 2, 4)
  assert list(finished.shard.skipped) == ["p001", "p003"]
  assert finished.shard.skipped["p001"] == "no header"
  assert "cut off or damaged" in finished.shard.skipped["p003"]
  assert [r.key for r in read(tmp_path, finished)] == ["p000", "p002", "p004"]
  assert sum(done) == 5


class Flaky(sources.Pictures):
  """The record of a number fails with errors, in turn."""

  def __init__(self, count, number, errors):
    super().__init__(count)
    self.number, self.errors = number, list(errors)

  def __getitem__(self, index):
    if index == self.number and self.errors:
      raise self.errors.pop(0)
    return super().__getitem__(index)

  def __getitems__(self, indices):
    return [self[index] for index in indices]


def test_what_a_disk_gives_at_last_is_not_left_out(encoders, tmp_path):
  whole = make_maker(sources.Pictures(5), encoders)
  made = whole.make(0, storage.Directory(tmp_path))
  # Too many for the batch, not for the record alone.
  errors = [OSError(errno.EIO, "Input/output error")] * 6
  flaky = make_maker(Flaky(5, 3, errors), encoders)
  again = flaky.make(0, storage.Directory(tmp_path))
  assert again == made
  assert not again.shard.skipped


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.EIO, "Input/output error"),
    TimeoutError("no answer"),
    PermissionError(errno.EACCES, "Permission denied"),
  ],
)
def test_what_a_disk_does_not_give_ends_the_shard(encoders, tmp_path, error):
  maker = make_maker(Flaky(5, 3, [error] * 99), encoders)
  with pytest.raises(OSError, match="record 3 of pictures cannot .* not skip"):
    maker.make(0, storage.Directory(tmp_path))
  assert maker.find(0, tmp_path) is None


def test_contents_that_a_decoder_refuses_are_left_out(encoders, tmp_path):
  damage = OSError("Corrupt snappy compressed data.")
  maker = make_maker(Flaky(5, 3, [damage] * 99), encoders)
  finished = maker.make(0, storage.Directory(tmp_path))
  assert finished.shard.skipped == {"record 3": str(damage)}


def test_a_shard_of_nothing_but_broken_pictures_has_no_file(encoders, tmp_path):
  source = sources.Pictures(10, broken=range(5, 10))
  maker = make_maker(source, encoders)
  finished = maker.make(1, storage.Directory(tmp_path))
  assert finished.shard.records == 0
  assert not (tmp_path / finished.shard.file).exists()
  assert maker.find(1, tmp_path) == finished


def test_latents_that_are_no_numbers_are_left_out(checkpoint, tmp_path):
  models = load(checkpoint, latents_only=True)
  models.autoencoder = jax.tree.map(
    lambda leaf: jnp.full_like(leaf, np.nan), models.autoencoder
  )
  maker = make_maker(sources.Pictures(2), models)
  finished = maker.make(0, storage.Directory(tmp_path))
  assert set(finished.shard.skipped.values()) == {"Its latents are not finite."}


def test_states_that_are_no_numbers_end_the_run(checkpoint):
  models = load(checkpoint)
  models.text = models.text._replace(
    model=jax.tree.map(
      lambda leaf: jnp.full_like(leaf, np.nan), models.text.model
    )
  )
  with pytest.raises(FloatingPointError, match="of the caption 'a red apple'"):
    models.encode_captions(["a red apple"])


def test_latents_only_keeps_captions_as_texts(checkpoint, tmp_path):
  models = load(checkpoint, latents_only=True)
  source = sources.Pictures(3)
  maker = make_maker(source, models)
  finished = maker.make(0, storage.Directory(tmp_path))
  for record, original in zip(
    read(tmp_path, finished), source.records, strict=True
  ):
    assert [c.text for c in record.captions] == [
      c.text for c in original.captions
    ]
    assert all(c.states is None for c in record.captions)
  assert not (tmp_path / cache.NULL_CAPTION).exists()
  with pytest.raises(ValueError, match="loaded without a text encoder"):
    models.encode_captions(["a"])


def test_captions_that_lose_their_end_are_counted(encoders):
  long = "a red apple on a table " * 5
  result = encoders.encode_captions(["a red apple", long, long, "a " + long])
  assert result.truncated == 2
  assert len(result.states) == 3
  assert len(result.states[long]) == tiny.LENGTH


def test_the_instruction_is_read_once_for_all_captions(checkpoint):
  events = []
  models = load(checkpoint)
  models.progress = events.append
  captions = ["a red apple", "a cat", "a table", "", "a green table"]
  for _ in range(2):  # two batches of three
    models.encode_captions(captions)
  runs = [e for e in events if e.phase == "run" and e.seconds is not None]
  assert [e.stage for e in runs] == ["text encoder"] * (1 + 2 + 2)


def test_the_null_caption_has_no_instruction_and_all_its_padding(encoders):
  expected, mask = text.encode_prompts(
    encoders.text.model,
    encoders.text.tokenizer,
    [""],
    max_sequence_length=tiny.LENGTH,
  )
  found = encoders.null_caption()
  assert found.shape == (tiny.LENGTH, 12)
  assert int(mask.sum()) == 1
  np.testing.assert_allclose(
    found.astype(np.float32), expected[0], rtol=2**-8, atol=1e-3
  )


def test_large_pictures_are_encoded_in_tiles(checkpoint, encoders, rng):
  tiled = load(checkpoint, tile=32)
  assert tiled.tiling == tiling.square(32)
  pixels = rng.integers(0, 256, (2, 32, 40, 3), np.uint8)
  images = pixels.astype(np.float32) / 127.5 - 1
  whole = 0.4 * jitted_encode(encoders.autoencoder, images)
  expected = 0.4 * jax.jit(tiling.encode, static_argnums=2)(
    encoders.autoencoder, images, tiling.square(32)
  )
  found = tiled.encode_images(pixels).astype(np.float32)
  np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-3)
  assert np.abs(found - whole).max() > 0.01


@pytest.mark.parametrize(
  ("side", "tile"), [(512, None), (1024, None), (2048, 1024), (4096, 1024)]
)
def test_pictures_above_1024_are_encoded_in_tiles_by_default(side, tile):
  assert encoders_lib.default_tile(side) == tile


def test_models_are_identified_by_their_contents(checkpoint, encoders):
  again = load(checkpoint, latents_only=True)
  assert again.identity["text_encoder_sha256"] is None
  assert again.identity["lowercase"] is None
  same = "autoencoder_sha256"
  assert again.identity[same] == encoders.identity[same]
  assert encoders.identity["max_sequence_length"] == tiny.LENGTH
  assert encoders.identity["text_width"] == 12
  lines = "\n".join(tiny.INSTRUCTION).encode()
  digest = hashlib.sha256(lines).hexdigest()
  assert encoders.identity["instruction_sha256"] == digest


def test_impossible_options_are_refused(checkpoint):
  with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
    load(checkpoint, batch_size=0)
  with pytest.raises(ValueError, match="must be multiples of 4"):
    load(checkpoint, tile=18)
  with pytest.raises(ValueError, match="has no vae/ and text_encoder/"):
    load(checkpoint / "transformer")


def test_a_shard_without_its_description_is_not_there(encoders, tmp_path):
  maker = make_maker(sources.Pictures(3), encoders)
  finished = maker.make(0, storage.Directory(tmp_path))
  name = finished.shard.file
  content = (tmp_path / name).read_bytes()
  (tmp_path / name).write_bytes(content[:-1])
  assert maker.find(0, tmp_path) is None
  (tmp_path / name).write_bytes(content)
  assert maker.find(0, tmp_path) == finished
  (tmp_path / cache.NULL_CAPTION).rename(tmp_path / "elsewhere")
  assert maker.find(0, tmp_path) is None
  (tmp_path / "elsewhere").rename(tmp_path / cache.NULL_CAPTION)
  (tmp_path / shards.sidecar_name(name)).unlink()
  assert maker.find(0, tmp_path) is None


def test_a_shard_that_was_made_with_other_settings_is_not_there(
  encoders, tmp_path
):
  maker = make_maker(sources.Pictures(3), encoders)
  maker.make(0, storage.Directory(tmp_path))
  settings = dataclasses.replace(maker.settings, source_fingerprint="0" * 64)
  assert maker._replace(settings=settings).find(0, tmp_path) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"shard": {}}'])
def test_a_broken_description_is_named(tmp_path, content):
  path = tmp_path / "shard-00000-of-00001.json"
  path.write_text(content)
  with pytest.raises(ValueError, match="shard-00000-of-00001.json does not de"):
    shards.Finished.read(path)


def test_a_full_disk_leaves_no_half_shard(encoders, tmp_path, monkeypatch):
  import resource  # noqa: PLC0415

  maker = make_maker(sources.Pictures(5), encoders)
  directory = storage.Directory(tmp_path)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
  try:
    with pytest.raises(OSError, match="Cannot write .*shard.*same command"):
      maker.make(0, directory)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  assert not list(tmp_path.glob("*shard*"))
  assert not list(tmp_path.glob(".tmp-*"))


def test_the_plan_cuts_the_source_and_batches_by_bucket():
  source = sources.Pictures(13)
  plan = make_plan(source, {4: "broken"}, batch_size=2)
  assert plan.num_shards == 3
  assert [len(plan.indices(shard)) for shard in range(3)] == [5, 5, 3]
  seen = []
  for shard in range(3):
    for batch in plan.batches(shard):
      assert 1 <= len(batch.indices) <= 2
      assert {plan.bucket_of[i] for i in batch.indices} == {batch.bucket}
      assert set(batch.indices) <= set(plan.indices(shard))
      seen += batch.indices
  assert sorted(seen) == [i for i in range(13) if i != 4]
  assert plan.bucket_of[4] == -1
  for index in seen:
    height, width = sources.SHAPES[index % 4]
    found = plan.shapes[plan.bucket_of[index]]
    assert abs(np.log(found[0] / found[1] * width / height)) < 0.2


def test_few_buckets_take_all_pictures():
  plan = make_plan(sources.Pictures(12), max_buckets=1)
  assert len(plan.shapes) == 1
  assert set(plan.bucket_of) == {0}


def test_few_pictures_of_a_shape_go_to_another():
  source = sources.Pictures(15)
  all_shapes = make_plan(source)
  assert np.bincount(all_shapes.bucket_of).min() == 3
  plan = make_plan(source, min_pictures=4)
  counts = np.bincount(plan.bucket_of)
  assert len(plan.shapes) == len(counts) > 1
  assert counts.min() >= 4
  assert counts.sum() == 15


@pytest.mark.parametrize(
  "changes", [{"records_per_shard": 0}, {"max_buckets": 0}, {"min_pictures": 0}]
)
def test_impossible_plans_are_refused(changes):
  with pytest.raises(ValueError, match=f"{next(iter(changes))} .0."):
    make_plan(sources.Pictures(2), **changes)


def test_hosts_share_the_shards_out():
  parts = [list(plan_lib.shards_of_host(7, i, 3)) for i in range(3)]
  assert parts == [[0, 3, 6], [1, 4], [2, 5]]
  with pytest.raises(ValueError, match="host_index must be .* got 3 of 3"):
    plan_lib.shards_of_host(7, 3, 3)


def test_what_is_missing_is_named_when_completing(encoders, tmp_path):
  with pytest.raises(FileNotFoundError, match="has no run.json"):
    finalise.finalise(storage.Directory(tmp_path))
  (tmp_path / finalise.RUN).write_text(json.dumps({"source": "x"}))
  with pytest.raises(ValueError, match="does not describe a cache"):
    finalise.finalise(storage.Directory(tmp_path))
