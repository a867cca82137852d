"""Pictures and caches as inputs: what is read, and what a step makes of it."""

import dataclasses
import json
import shutil
import time

import jax
import numpy as np
import pytest

from configs import folder as folder_config
from sana_jax import config as config_lib
from sana_jax import text
from sana_jax.data import (
  buckets,
  cache_records,
  captions,
  loader,
  opening,
  readers,
  records,
  sampler,
  transforms,
)
from sana_jax.data import cache as cache_lib
from sana_jax.pipeline import training_run
from sana_jax.precompute import encoders as encoders_lib
from sana_jax.precompute import job, task
from sana_jax.training import inputs, loop, text_to_image
from tests import caches, tiny
from tests import pictures as picture_files
from tests.precompute import sources

COUNT, SIDE = 24, 32


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint")
  caches.make_checkpoint(path)
  return path


@pytest.fixture(scope="module")
def pictures():
  return sources.Pictures(COUNT)


@pytest.fixture(scope="module")
def cache(checkpoint, pictures, tmp_path_factory):
  """The directory of a cache of the pictures."""
  path = tmp_path_factory.mktemp("cache")
  caches.make_cache(path, checkpoint, pictures, SIDE)
  return path


def test_broken_pictures_are_left_out_and_counted(checkpoint, tmp_path, rng):
  files, _ = picture_files.planted(rng)
  picture_files.write_folder(tmp_path, files)
  config = make_config(checkpoint, path=str(tmp_path), verify=True)
  opened = opening.open_pictures(
    config.data,
    multiple=4,
    tokenize=lambda text: {"length": np.array([len(text)])},
    batch_size=4,
    seed=0,
  )
  # Truncated, no image, no bytes, and a caption that is not text.
  (report,) = opened.reports
  assert (report.read, report.used) == (19, 15)
  assert sum(report.skipped.values()) == 4
  seen = next(iter(opened.batches(loader.Host(), 0)))
  assert seen["images"].shape == (4, SIDE, SIDE, 3)


def test_a_broken_picture_stops_a_run_that_did_not_look(
  checkpoint, tmp_path, rng
):
  files, _ = picture_files.planted(rng)
  kept = {n: c for n, c in files.items() if n.startswith("truncated")}
  picture_files.write_folder(tmp_path, kept)
  config = make_config(checkpoint, path=str(tmp_path))
  opened = opening.open_pictures(
    config.data,
    multiple=4,
    tokenize=lambda text: {"length": np.array([len(text)])},
    batch_size=4,
    seed=0,
  )
  with pytest.raises(ValueError, match="truncated: .*set data.verify=True"):
    next(iter(opened.batches(loader.Host(), 0)))


def test_a_caption_that_is_no_text_stops_such_a_run_too(tmp_path, rng):
  files, _ = picture_files.planted(rng)
  kept = {n: c for n, c in files.items() if n.startswith("garbled")}
  picture_files.write_folder(tmp_path, kept)
  opened = opening.open_pictures(
    config_lib.DataConfig(path=str(tmp_path), image_size=SIDE),
    multiple=4,
    tokenize=lambda text: {"length": np.array([len(text)])},
    batch_size=1,
    seed=0,
  )
  with pytest.raises(ValueError, match="garbled.txt .*set data.verify=True"):
    next(iter(opened.batches(loader.Host(), 0)))


def make_config(checkpoint, **data) -> config_lib.TextToImageConfig:
  tokenizer = text.Tokenizer.from_pretrained(checkpoint / "tokenizer")
  return config_lib.TextToImageConfig(
    model=tiny.transformer_config(),
    text_encoder=tiny.text_encoder_config(tokenizer.vocab_size),
    text_encoder_path=str(checkpoint / "text_encoder"),
    autoencoder=str(checkpoint / "vae"),
    tokenizer=str(checkpoint / "tokenizer"),
    max_sequence_length=tiny.LENGTH,
    sample_prompts=("a cat",),
    sample_steps=2,
    batch_size=8,
    dtype="float32",
    remat="none",
    data=config_lib.DataConfig(image_size=SIDE, **data),
  )


def words(texts) -> loader.Batch:
  return {"words": np.array(texts)}


def plan_of(*rows, bucket=0) -> sampler.BatchPlan:
  source, index, draw = np.array(rows).T
  return sampler.BatchPlan(bucket, source, index, draw.astype(np.uint64))


def test_pictures_are_fitted_and_captioned(pictures):
  selection = captions.CaptionSelection()
  reader = readers.PictureReader(
    [pictures, sources.Pictures(5, seed=1)],
    *([(32, 32), (24, 40)], selection, words),
  )
  batch = reader(plan_of((0, 7, 1), (1, 2, 2), (0, 3, 3), bucket=1))
  first, second = reader.sources
  chosen = (first[7], second[2], first[3])
  expected = [
    transforms.fit(transforms.decode(record.image), 24, 40) for record in chosen
  ]
  np.testing.assert_array_equal(batch["images"], np.stack(expected))
  assert batch["images"].dtype == np.uint8
  assert batch["words"].tolist() == [
    first[7].captions[0].text,
    second[2].captions[0].text,
    "",  # Record 3 has no captions.
  ]


def test_what_is_random_about_a_picture_follows_its_draw():
  pictures = sources.Pictures(1)
  several = tuple(records.Caption(name, name) for name in ("one", "two"))
  pictures.records[0] = dataclasses.replace(pictures[0], captions=several)
  reader = readers.PictureReader(
    *([pictures], [(24, 24)], captions.CaptionSelection("random"), words),
    crop="random",
    flip=True,
  )
  batch = reader(plan_of(*((0, 0, draw % 10) for draw in range(20))))
  for rows in batch.values():
    np.testing.assert_array_equal(rows[:10], rows[10:])
    assert len(np.unique(rows[:10], axis=0)) > 1


def test_a_broken_picture_is_named():
  broken = sources.Pictures(3, broken=(1,))
  reader = readers.PictureReader(
    [broken], [(24, 24)], captions.CaptionSelection(), words
  )
  with pytest.raises(ValueError, match="pictures, p001: .*(cut off|damaged)"):
    reader(plan_of((0, 0, 0), (0, 1, 0)))


def test_a_cache_stands_for_its_pictures(checkpoint, pictures, cache):
  """The step makes the same of either, up to the cache's bfloat16."""
  config = make_config(checkpoint, cache=str(cache))
  generation = training_run.generation_config(config)
  from_cache = inputs.from_cache(
    config, tiny.autoencoder_config(), generation, words
  )
  (cached,) = take(from_cache.batches, 1)
  source = cache_lib.CachedSource(cache)
  # The same records of the source, found by their keys.
  plans = sampler_of(source, config)
  plan = plans.batch(0)
  keys = [source[int(index)].key for index in plan.index]
  numbers = [int(key[1:]) for key in keys]
  shape = from_cache.size_of(cached)
  tokenizer = text.Tokenizer.from_pretrained(config.tokenizer)
  reader = readers.PictureReader(
    *([pictures], [shape], captions.CaptionSelection()),
    lambda texts: text_to_image._tokenize(tokenizer, generation, texts),
  )
  batch = reader(
    sampler.BatchPlan(0, 0 * plan.source, np.array(numbers), plan.draw)
  )
  recipe_config = make_config(checkpoint)
  frozen = text_to_image._frozen(recipe_config, tokenizer, encoding())
  autoencoder = caches.load_encoders(checkpoint).autoencoder
  online = jax.jit(
    lambda frozen, batch: inputs.images_to_conditions(
      {}, frozen, batch, config, scaling_factor=0.4
    )
  )(frozen | {"autoencoder": autoencoder}, batch)
  offline = inputs.cached_conditions({}, from_cache.frozen, cached, config)
  np.testing.assert_allclose(
    *(offline.latents, online.latents), rtol=2**-8, atol=1e-3
  )
  np.testing.assert_array_equal(offline.text_mask, online.text_mask)
  np.testing.assert_array_equal(offline.null_text_mask, online.null_text_mask)
  real = np.asarray(online.text_mask)
  for ours, theirs in (
    (offline.text[real], online.text[real]),
    (offline.null_text, online.null_text),
  ):
    np.testing.assert_allclose(
      *(np.asarray(ours, np.float32), theirs), rtol=2**-8, atol=1e-3
    )


def encoding() -> inputs.Inputs:
  """Inputs of which only it matters that they encode text."""
  return inputs.Inputs(iter, {}, iter, True, 1, iter)


def take(batches, count, first_step=0, **host):
  found = iter(batches(loader.Host(**host), first_step))
  return [next(found) for _ in range(count)]


def sampler_of(source, config):
  shapes = np.array(source.manifest.settings.buckets)[source.buckets]
  sizes = buckets.Sizes(source.name, shapes[:, 0], shapes[:, 1], {})
  found = buckets.group([sizes], [1.0], 10)
  return sampler.BatchSampler(found.populations, config.batch_size, config.seed)


def test_all_shapes_of_a_cache_are_trained_at(checkpoint, cache):
  config = make_config(checkpoint, cache=str(cache))
  recipe = text_to_image.make_recipe(config)
  assert recipe.num_shapes > 1
  batches = take(recipe.batches, 12)
  names = {recipe.name_shape(batch) for batch in batches}
  assert len(names) == recipe.num_shapes
  assert "text_encoder" not in recipe.frozen
  assert all(batch["text"].shape == (8, tiny.LENGTH, 12) for batch in batches)


def test_all_of_a_cache_is_trained_on_and_repeats_are_said(
  checkpoint, cache, caplog
):
  config = make_config(checkpoint, cache=str(cache))
  recipe = text_to_image.make_recipe(config)
  (report,) = recipe.ledger.report(0)["sources"]
  assert report["used"] == report["read"] == COUNT
  # Six of each of four sizes.
  assert (
    "24 of 24 pictures are of shapes of fewer than a batch of 8" in caplog.text
  )
  assert "a smaller batch_size, or another cache by" in caplog.text
  assert "--min_pictures=8" in caplog.text
  caplog.clear()
  text_to_image.make_recipe(dataclasses.replace(config, batch_size=2))
  assert "fewer than a batch" not in caplog.text


def test_a_cache_of_another_kind_is_refused(checkpoint, cache, tmp_path):
  config = make_config(checkpoint, cache=str(cache))
  config.data.image_size = 64
  config.use_complex_human_instruction = True
  with pytest.raises(
    ValueError, match="(?s)image_size is 32, .* 64.*instruction_sha256 is None"
  ):
    text_to_image.make_recipe(config)
  config = make_config(checkpoint, cache=str(cache), max_buckets=1)
  with pytest.raises(ValueError, match="data.max_buckets is 1, but .* stored"):
    text_to_image.make_recipe(config)
  config = make_config(checkpoint, cache=str(cache), buckets="square")
  with pytest.raises(ValueError, match="='square': set it to None"):
    text_to_image.make_recipe(config)
  config = make_config(checkpoint, cache=str(tmp_path))
  with pytest.raises(FileNotFoundError, match=r"has no manifest\.json"):
    text_to_image.make_recipe(config)


def test_a_cache_of_one_shape_is_said_where_many_are_wanted(
  checkpoint, pictures, tmp_path, caplog
):
  prepared = job.assemble(
    task.Task(
      source="pictures",
      checkpoint=str(checkpoint),
      image_size=SIDE,
      buckets="square",
      batch_size=4,
    ),
    *(pictures, pictures.sizes(), "f" * 64, caches.load_encoders(checkpoint)),
  )
  job.run(prepared, tmp_path, started=time.monotonic())
  for kind in (None, "square", "aspect"):
    config = make_config(checkpoint, cache=str(tmp_path), buckets=kind)
    assert text_to_image.make_recipe(config).num_shapes == 1
    said = "has one shape, 32x32, though data.buckets is 'aspect'"
    assert (said in caplog.text) == (kind == "aspect")


def test_a_folder_is_trained_at_the_shapes_that_its_cache_has(
  checkpoint, cache
):
  wanted = folder_config.get_config().data.buckets
  config = make_config(checkpoint, cache=str(cache), buckets=wanted)
  assert text_to_image.make_recipe(config).num_shapes == 4


def test_states_of_a_text_encoder_that_is_trained_are_refused(
  checkpoint, cache
):
  config = dataclasses.replace(
    make_config(checkpoint, cache=str(cache)), train_text_encoder=True
  )
  with pytest.raises(ValueError, match="holds text states, which train_text_"):
    text_to_image.make_recipe(config)


def test_a_cache_without_text_states_is_trained_with_a_text_encoder(
  checkpoint, pictures, tmp_path
):
  prepared = job.assemble(
    task.Task(
      source="pictures",
      checkpoint=str(checkpoint),
      image_size=SIDE,
      batch_size=4,
    ),
    *(pictures, pictures.sizes(), "f" * 64),
    encoders_lib.load(
      *(str(checkpoint),),
      dtype="float32",
      tile=None,
      batch_size=4,
      latents_only=True,
    ),
  )
  job.run(prepared, tmp_path, started=time.monotonic())
  config = make_config(checkpoint, cache=str(tmp_path))
  recipe = text_to_image.make_recipe(config)
  assert {"text_encoder", "null_ids"} <= set(recipe.frozen)
  (batch,) = take(recipe.batches, 1)
  assert {*batch} == {"latents", "input_ids", "attention_mask"}
  assert batch["latents"].dtype == cache_records.BFLOAT16
  # The captions are those of the records.
  source = cache_lib.CachedSource(tmp_path)
  plan = sampler_of(source, config).batch(0)
  captions_of = [source[int(i)].captions for i in plan.index]
  tokenizer = text.Tokenizer.from_pretrained(config.tokenizer)
  expected = text_to_image._tokenize(
    *(tokenizer, training_run.generation_config(config)),
    [found[0].text if found else "" for found in captions_of],
  )
  np.testing.assert_array_equal(batch["input_ids"], expected["input_ids"])
  params = jax.eval_shape(recipe.init, jax.random.key(0))
  loss, _ = jax.eval_shape(
    recipe.loss_fn, params, recipe.frozen, jax.random.key(1), batch
  )
  assert loss.shape == ()
  made = jax.jit(
    lambda frozen, batch: inputs.latents_to_conditions(
      {}, frozen, batch, config
    )
  )(recipe.frozen, batch)
  latents = np.stack([source[int(i)].latents for i in plan.index])
  np.testing.assert_array_equal(made.latents, latents.astype(np.float32))
  np.testing.assert_array_equal(made.text_mask, batch["attention_mask"] > 0)
  # The text encoder may be trained, too: there are no states to go stale.
  trained = dataclasses.replace(config, train_text_encoder=True)
  assert "text_encoder" not in text_to_image.make_recipe(trained).frozen


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("resample", "lanczos", "resample is 'lanczos', training needs 'bicubic'"),
    ("crop", "random", "crop is 'random', training needs 'center'"),
    ("buckets", ((64, 64),), r"buckets has \[\(64, 64\)\], which are not in"),
    (
      "buckets",
      ((33, 31),),
      r"buckets has \[\(33, 31\)\], training needs mult",
    ),
  ],
)
def test_what_a_cache_was_made_with_is_compared(
  checkpoint, cache, field, value, message
):
  config = make_config(checkpoint, cache=str(cache))
  manifest = cache_lib.CachedSource(cache).manifest
  changed = dataclasses.replace(
    manifest,
    settings=dataclasses.replace(manifest.settings, **{field: value}),
  )
  arguments = (
    *(config, tiny.autoencoder_config()),
    training_run.generation_config(config),
  )
  inputs.check_cache(manifest, *arguments)
  with pytest.raises(ValueError, match=message):
    inputs.check_cache(changed, *arguments)
  config.data.resample = "lanczos"
  if field == "resample":
    inputs.check_cache(changed, *arguments)


@pytest.mark.parametrize("field", ["tile", "dtype", "source_fingerprint"])
def test_a_cache_that_was_made_again_otherwise_is_another(
  checkpoint, cache, tmp_path, field
):
  copy = shutil.copytree(cache, tmp_path / "cache")
  config = make_config(checkpoint, cache=str(copy))
  run = tmp_path / "run"
  run.mkdir()
  text_to_image.make_recipe(config).ledger.begin(run, has_learned=True)
  manifest = json.loads((copy / "manifest.json").read_text())
  manifest["settings"][field] = "other"
  (copy / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(ValueError, match=f"cache: {field} is other, was"):
    text_to_image.make_recipe(config).ledger.begin(run, has_learned=True)


def make_cache(checkpoint, path, **what):
  prepared = job.prepare(
    task.Task(
      checkpoint=str(checkpoint), image_size=SIDE, buckets="square", **what
    )
  )
  job.run(prepared, path, started=time.monotonic())
  return str(path)


def train_two_steps(checkpoint, workdir, **data):
  """Returns the losses, and what of the source was read and used."""
  config = make_config(checkpoint, **data)
  config.num_steps, config.log_every = 2, 1
  loop.train(config, workdir, text_to_image.make_recipe(config, workdir))
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  report = json.loads((workdir / "data_report.json").read_text())
  return [json.loads(line)["loss"] for line in lines], report["sources"][0]


@pytest.mark.slow
def test_a_folder_of_broken_files_is_trained_from(checkpoint, tmp_path, rng):
  files, _ = picture_files.planted(rng)
  picture_files.write_folder(tmp_path / "planted", files)
  planted = str(tmp_path / "planted")
  cached = make_cache(checkpoint, tmp_path / "cache", source=planted)
  losses = []
  for name, data in (
    ("pictures", {"path": planted, "verify": True}),
    ("cache", {"cache": cached}),
  ):
    found, source = train_two_steps(
      checkpoint, tmp_path / f"run_{name}", **data
    )
    losses.append(found)
    # Truncated, no image, no bytes, and a caption that is not text.
    assert (source["read"], source["used"], source["skipped"]) == (19, 15, 4)
    keys = [k for keys in source["skipped_by_reason"].values() for k in keys]
    assert {"truncated", "no_image", "zero"} < {*keys}
  assert len(losses[0]) == 2
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)


@pytest.mark.slow
@pytest.mark.long
def test_emoji_go_through_a_cache_to_training(checkpoint, tmp_path):
  cached = make_cache(
    checkpoint,
    tmp_path / "cache",
    source="sana_jax/assets/emoji_64",
    split="heldout",
  )
  losses, source = train_two_steps(checkpoint, tmp_path / "run", cache=cached)
  assert len(losses) == 2
  assert np.isfinite(losses).all()
  assert (source["read"], source["used"], source["skipped"]) == (80, 80, 0)


def test_pictures_of_several_sources_are_opened_by_the_config(
  checkpoint, pictures, tmp_path
):
  for name in ("one", "two"):
    (tmp_path / name).mkdir()
    for record in pictures.records:
      file = tmp_path / name / f"{record.key}.png"
      file.write_bytes(record.image)
      file.with_suffix(".txt").write_text(f"a {name} cat")
  (tmp_path / "two" / "p000.png").write_bytes(b"no picture")
  config = make_config(
    checkpoint,
    buckets="aspect",
    max_buckets=2,
    sources=tuple(
      config_lib.SourceConfig(path=str(tmp_path / name), weight=weight)
      for name, weight in (("one", 1.0), ("two", 3.0))
    ),
  )
  recipe = text_to_image.make_recipe(config)
  assert recipe.num_shapes == 2
  assert {"autoencoder", "text_encoder", "null_ids"} <= set(recipe.frozen)
  batches = take(recipe.batches, 8)
  assert len({recipe.name_shape(batch) for batch in batches}) == 2
  later = take(recipe.batches, 3, 5, process=1, processes=2)
  for whole, part in zip(batches[5:], later, strict=True):
    for name, rows in part.items():
      np.testing.assert_array_equal(rows, whole[name][4:])
  params = jax.jit(recipe.init)(jax.random.key(0))
  loss, _ = jax.jit(recipe.loss_fn)(
    params, recipe.frozen, jax.random.key(1), batches[0]
  )
  assert np.isfinite(loss)
