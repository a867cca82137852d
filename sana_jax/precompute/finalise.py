"""Completes a cache when all shards are there; any host may do it.

python -m sana_jax.precompute.finalise --output=DIR
"""

import dataclasses
import importlib.metadata
import io
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags, logging

from sana_jax import storage
from sana_jax.data import cache, cache_manifest
from sana_jax.precompute import shards, task

RUN = "run.json"
_NAMED = 10
_MAX_KEYS = 5


class UnfinishedError(FileNotFoundError):
  """Some shards are not there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
  """What a directory's cache is made from and with.

  Attributes:
    source: its name, for people, as `checkpoint`.
  """

  settings: cache_manifest.Settings
  num_shards: int
  source: str
  checkpoint: str

  def claim(self, directory: storage.Directory) -> None:
    """Makes a directory that of this cache, or finds that it is already.

    Raises:
      FileExistsError: another cache is there; says what differs.
      OSError: it cannot be written.
    """
    values = {
      **self.settings.to_json(),
      "num_shards": self.num_shards,
      "source": self.source,
      "checkpoint": self.checkpoint,
    }
    directory.path.mkdir(parents=True, exist_ok=True)
    file = directory.path / RUN
    if file.exists():
      storage.check_same(
        file,
        values,
        program="sana_jax.precompute",
        advice="use another --output, or remove that one",
        free=("source", "checkpoint"),
      )
      return
    content = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    directory.write(RUN, content.encode())
    directory.sync()


def read_run(path: pathlib.Path) -> Run:
  """Reads what a directory's cache is made from and with.

  Raises:
    FileNotFoundError: no cache is being made there.
    ValueError: the description is broken.
  """
  file = path / RUN
  if not file.is_file():
    raise FileNotFoundError(
      f"{path} has no {RUN}: expected the --output of python -m "
      "sana_jax.precompute."
    )
  try:
    values = json.loads(file.read_text(encoding="utf-8"))
    return Run(
      source=values.pop("source"),
      checkpoint=values.pop("checkpoint"),
      num_shards=int(values.pop("num_shards")),
      settings=cache_manifest.Settings.from_json(values),
    )
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{file} does not describe a cache: {error}.") from error


class Completed(NamedTuple):
  """A cache that is ready, and its shards in order."""

  manifest: cache_manifest.Manifest
  finished: tuple[shards.Finished, ...]


def finalise(
  directory: storage.Directory,
) -> Completed:
  """Writes the manifest and the buckets of a complete cache.

  Raises:
    UnfinishedError: shards are missing; names them.
    FileNotFoundError: no cache is being made there.
    OSError: something cannot be written.
    ValueError: a description is broken.
  """
  path = directory.path
  run = read_run(path)
  names = [
    shards.shard_name(number, run.num_shards)
    for number in range(run.num_shards)
  ]
  found = [shards.find(path, name, run.settings) for name in names]
  missing = [n for n, shard in zip(names, found, strict=True) if shard is None]
  has_text = run.settings.text_encoder_sha256 is not None
  if has_text and not (path / cache.NULL_CAPTION).is_file():
    missing.append(cache.NULL_CAPTION)
  if missing:
    more = f" and {len(missing) - _NAMED} more" * (len(missing) > _NAMED)
    raise UnfinishedError(
      f"{path} is not finished, {len(missing)} of {len(names)} shards are "
      f"missing: {', '.join(missing[:_NAMED])}{more}. Run the command of the "
      "hosts that make them."
    )
  manifest = cache_manifest.Manifest(
    settings=run.settings,
    checkpoint=run.checkpoint,
    source=run.source,
    shards=tuple(each.shard for each in found),
    versions={
      "jax": jax.__version__,
      "sana_jax": importlib.metadata.version("sana_jax"),
    },
  )
  numbers = [bucket for each in found for bucket in each.buckets]
  buffer = io.BytesIO()
  np.save(buffer, np.asarray(numbers, np.uint16))
  directory.write(cache.BUCKETS, buffer.getvalue())
  directory.write(cache_manifest.MANIFEST, manifest.to_json().encode())
  directory.sync()
  return Completed(manifest, tuple(found))


def describe(manifest: cache_manifest.Manifest) -> str:
  """Says how large a cache is, and what it left out."""
  captions = manifest.total("captions")
  lines = [
    f"{manifest.records} records in {len(manifest.shards)} shards, "
    f"{manifest.total('bytes'):,} bytes"
  ]
  if manifest.records:
    per_latent = manifest.total("latent_bytes") / manifest.records
    lines.append(f"{per_latent:,.0f} bytes per latent")
  if captions and manifest.has_text:
    per_caption = manifest.total("text_bytes") / captions
    lines.append(f"{per_caption:,.0f} bytes per caption ({captions} captions)")
  if truncated := manifest.total("truncated_captions"):
    lines.append(
      f"{truncated} captions had more than "
      f"{manifest.settings.max_sequence_length} tokens and lost their end"
    )
  if skipped := manifest.skipped:
    shown = [f"{key}: {why}" for key, why in list(skipped.items())[:_MAX_KEYS]]
    lines.append(f"{len(skipped)} pictures skipped: {'; '.join(shown)}")
  return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  logging.set_verbosity(logging.INFO)
  try:
    path = task.output_directory(flags.FLAGS.output)
    manifest = finalise(storage.Directory(path, "finalise")).manifest
  except (OSError, ValueError) as error:
    sys.stderr.write(f"precompute: {error}\n")
    return 1
  logging.info("%s", describe(manifest))
  return 3 if manifest.skipped else 0


if __name__ == "__main__":
  flags.DEFINE_string("output", None, "The cache.", required=True)
  app.run(main)
