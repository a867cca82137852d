"""A checkpoint, and a cache that it makes, small enough for a test."""

import pathlib
import time

from sana_jax.precompute import encoders as encoders_lib
from sana_jax.precompute import job, task
from tests import tiny
from tests.precompute import sources

_BATCH_SIZE = 4


def make_checkpoint(path: pathlib.Path) -> None:
  """Saves a random pipeline without an instruction, as training has none."""
  tiny.make_tokenizer(path / "made")
  pipe = tiny.make_pipeline(path / "made")
  pipe.generation_config.complex_human_instruction = None
  pipe.save_pretrained(path)


def load_encoders(checkpoint: pathlib.Path) -> encoders_lib.Encoders:
  return encoders_lib.load(
    str(checkpoint), dtype="float32", tile=None, batch_size=_BATCH_SIZE
  )


def make_cache(
  path: pathlib.Path,
  checkpoint: pathlib.Path,
  pictures: sources.Pictures,
  image_size: int,
  max_buckets: int = task.Task.max_buckets,
) -> None:
  """Makes a cache of pictures, in shards of ten."""
  prepared = job.assemble(
    task.Task(
      source="pictures",
      checkpoint=str(checkpoint),
      image_size=image_size,
      records_per_shard=10,
      max_buckets=max_buckets,
      batch_size=_BATCH_SIZE,
      min_pictures=1,
    ),
    *(pictures, pictures.sizes(), "f" * 64, load_encoders(checkpoint)),
  )
  job.run(prepared, path, started=time.monotonic())
