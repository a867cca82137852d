"""Beam's workers make the command's shards, of the same files only."""

import dataclasses
import os
import time

import numpy as np
import pytest

from sana_jax.precompute import job, task
from tests import tiny
from tests.precompute import sources

pytest.importorskip("apache_beam")
pytestmark = pytest.mark.slow

from apache_beam.options import pipeline_options  # noqa: E402

from sana_jax.precompute import beam_pipeline  # noqa: E402


@pytest.fixture(scope="module")
def what(tmp_path_factory):
  path = tmp_path_factory.mktemp("files")
  tiny.make_tokenizer(path / "tokenizer_files")
  pipe = tiny.make_pipeline(path / "tokenizer_files")
  pipe.save_pretrained(path / "checkpoint")
  (path / "pictures").mkdir()
  rng = np.random.default_rng(0)
  for index in range(9):
    image = sources.png(rng, *sources.SHAPES[index % 4])
    (path / "pictures" / f"p{index}.png").write_bytes(image)
    (path / "pictures" / f"p{index}.txt").write_text(f"a cat {index}")
  return task.Task(
    source=str(path / "pictures"),
    checkpoint=str(path / "checkpoint"),
    image_size=32,
    batch_size=3,
    records_per_shard=4,
  )


def contents(path) -> dict[str, bytes]:
  return {
    file.name: file.read_bytes()
    for file in path.iterdir()
    if not file.name.startswith(".lock")
  }


def test_a_pipeline_goes_on_after_the_command_and_cleans_up(what, tmp_path):
  whole, path = tmp_path / "whole", tmp_path / "again"
  prepared = job.prepare(what)
  job.run(prepared, whole, started=time.monotonic())
  # One of two hosts is done; a worker of an earlier pipeline died.
  job.run(prepared, path, num_hosts=2, host_index=0, started=time.monotonic())
  (path / ".tmp-beam-0123-shard").write_bytes(b"half")
  before = {p.name: p.stat().st_mtime_ns for p in path.glob("*.array_record")}
  assert len(before) == 2
  options = pipeline_options.PipelineOptions(["--runner=DirectRunner"])
  completed = beam_pipeline.run(what, path, options)
  assert completed.manifest.records == 9
  assert contents(path) == contents(whole)
  for name, changed in before.items():
    assert os.stat(path / name).st_mtime_ns == changed


def test_a_worker_that_sees_other_files_is_refused(what, tmp_path):
  prepared = job.prepare(what)
  planned, settings = prepared.maker.plan, prepared.maker.settings
  fewer = dataclasses.replace(planned, bucket_of=planned.bucket_of[:-1])
  with pytest.raises(ValueError, match="has 9 records for this worker, 8 wh"):
    beam_pipeline.MakeShard(what, fewer, settings, str(tmp_path)).setup()
  other = dataclasses.replace(settings, autoencoder_sha256="0" * 64)
  with pytest.raises(ValueError, match="holds other models for this worker"):
    beam_pipeline.MakeShard(what, planned, other, str(tmp_path)).setup()
