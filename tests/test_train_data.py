"""train.py on pictures of many shapes and on a cache: killed and resumed."""

import os
import time

import numpy as np
import pytest
import safetensors.numpy

from sana_jax.precompute import job, task
from tests import caches, test_train
from tests.precompute import sources

STEPS = 16
CONFIG = """
from sana_jax import config as config_lib
from sana_jax import text
from tests import tiny


def get_config(directory):
  tokenizer = text.Tokenizer.from_pretrained(directory + "/tokenizer")
  config = config_lib.TextToImageConfig()
  config.autoencoder = directory + "/vae"
  config.tokenizer = directory + "/tokenizer"
  config.text_encoder_path = directory + "/text_encoder"
  config.text_encoder = tiny.text_encoder_config(tokenizer.vocab_size)
  config.model = tiny.transformer_config(num_layers=1)
  config.max_sequence_length = tiny.LENGTH
  config.data.image_size = 32
  config.data.caption_method = "random"
  config.num_steps = {steps}
  config.batch_size = 8
  config.log_every = 1
  config.checkpoint.every = 4
  config.mesh = {{"data": 2, "fsdp": 4}}
  config.dtype = "float32"
  config.remat = "none"
  config.sample_prompts = ("a red apple",)
  config.sample_steps = 2
  return config
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A checkpoint, two folders of pictures, and a cache of one."""
  path = tmp_path_factory.mktemp("base")
  caches.make_checkpoint(path)
  pictures = [sources.Pictures(32), sources.Pictures(13, seed=1)]
  for name, source in zip(("many", "few"), pictures, strict=True):
    (path / name).mkdir()
    for record in source.records:
      (path / name / f"{record.key}.png").write_bytes(record.image)
      texts = [caption.text for caption in record.captions]
      (path / name / f"{record.key}.txt").write_text(" and ".join(texts))
  caches.make_cache(path / "cache", path, pictures[0], 32, max_buckets=2)
  (path / "config.py").write_text(CONFIG.format(steps=STEPS))
  (path / "mixture.py").write_text(
    CONFIG.format(steps=STEPS).replace(
      "  return config\n",
      '  config.data.buckets = "aspect"\n'
      '  config.data.crop = "random"\n'
      "  config.data.max_buckets = 2\n"
      "  config.data.random_flip = True\n"
      "  config.data.sources = tuple(\n"
      "    config_lib.SourceConfig(path=f'{directory}/{name}', weight=weight)\n"
      "    for name, weight in (('many', 1.0), ('few', 2.0))\n"
      "  )\n"
      "  return config\n",
    )
  )
  return path


def weights(workdir):
  (path,) = (workdir / "export" / "transformer").glob("*.safetensors")
  return safetensors.numpy.load_file(path)


def assert_same_run(workdir, whole, **tolerance):
  expected, found = test_train.metrics(whole), test_train.metrics(workdir)
  assert [row["step"] for row in found] == list(range(1, STEPS + 1))
  for a, b in zip(found, expected, strict=True):
    for name in b:
      np.testing.assert_allclose(a[name], b[name], **tolerance)
  ours, theirs = weights(workdir), weights(whole)
  assert ours.keys() == theirs.keys()
  for name, weight in theirs.items():
    np.testing.assert_allclose(ours[name], weight, **tolerance)


@pytest.mark.long
def test_a_killed_run_on_pictures_continues_as_if_nothing_had_happened(
  base, tmp_path
):
  config = f"{base}/mixture.py:{base}"
  output = test_train.finish(test_train.start(config, tmp_path / "whole"))
  assert "(2 of 2 shapes)" in output
  assert "programs for" not in output
  assert "many: 32 records, 32 used" in output
  assert "batches per epoch" in output
  first = test_train.start(config, tmp_path / "parts")
  test_train.wait_for(tmp_path / "parts" / "checkpoints" / "4", first)
  first.kill()
  first.communicate()
  assert test_train.newest_checkpoint(tmp_path / "parts") < STEPS
  # Worker processes and threads may be others than before.
  again = test_train.start(
    *(config, tmp_path / "parts", "--config.data.num_threads=2"),
    "--config.data.num_workers=2",
  )
  assert "resuming from step" in test_train.finish(again)
  assert_same_run(tmp_path / "parts", tmp_path / "whole", rtol=0)


@pytest.mark.long
def test_a_run_on_a_cache_moves_from_one_process_to_two(base, tmp_path):
  config = f"{base}/config.py:{base}"
  cache = f"--config.data.cache={base}/cache"
  whole = test_train.start(config, tmp_path / "whole", cache)
  output = test_train.finish(whole)
  assert "(2 of 2 shapes)" in output
  assert "programs for" not in output
  first = test_train.start(config, tmp_path / "parts", cache)
  test_train.wait_for(tmp_path / "parts" / "checkpoints" / "4", first)
  first.terminate()
  assert "asked to stop: saved step" in test_train.finish(first)
  # What a Slurm job of two tasks on one node has in its environment.
  slurm = {
    "SLURM_JOB_ID": str(os.getpid()),
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_NTASKS": "2",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
  }
  pair = [
    test_train.start(
      *(config, tmp_path / "parts", cache, "--distributed"),
      **slurm,
      SLURM_PROCID=str(rank),
      SLURM_LOCALID=str(rank),
    )
    for rank in range(2)
  ]
  for process in pair:
    assert "resuming from step" in test_train.finish(process)
  # Sums over devices are taken in another order, step after step.
  assert_same_run(tmp_path / "parts", tmp_path / "whole", rtol=2e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.long
def test_training_from_a_cache_has_the_losses_of_training_from_pictures(
  base, tmp_path
):
  prepared = job.prepare(
    task.Task(
      source=str(base / "many"),
      checkpoint=str(base),
      image_size=32,
      buckets="square",
    )
  )
  job.run(prepared, tmp_path / "cache", started=time.monotonic())
  config = f"{base}/config.py:{base}"
  few = ("--config.num_steps=6", "--config.checkpoint.every=6")
  online, cached = (
    test_train.start(config, tmp_path / name, f"--config.data.{flag}", *few)
    for name, flag in (
      ("online", f"path={base}/many"),
      ("cached", f"cache={tmp_path}/cache"),
    )
  )
  for process in (online, cached):
    test_train.finish(process)
  expected = [row["loss"] for row in test_train.metrics(tmp_path / "online")]
  found = [row["loss"] for row in test_train.metrics(tmp_path / "cached")]
  assert len(expected) == 6
  # Latents and text states are bfloat16 in the cache: eight bits.
  np.testing.assert_allclose(found, expected, rtol=1e-2)
  assert found != expected
