"""Makes one shard: the same bytes whoever makes it, and however often.

Beside a shard lies a JSON file of the same name, written last: what is in the
shard. A shard without one is not there.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import NamedTuple

import numpy as np
import PIL
from jaxtyping import BFloat16, UInt8

from sana_jax import storage
from sana_jax.data import (
  buckets,
  cache,
  cache_manifest,
  cache_records,
  records,
  retrying,
  transforms,
)
from sana_jax.data.sources import access
from sana_jax.precompute import encoders as encoders_lib
from sana_jax.precompute import plan as plan_lib

_HASH_CHUNK = 1 << 24


@dataclasses.dataclass(frozen=True)
class Finished:
  """A shard that is on disk.

  Attributes:
    shard: what the manifest says of it.
    settings_sha256: of what it was made with.
    indices: of its records in the source.
    buckets: of its records.
  """

  shard: cache_manifest.Shard
  settings_sha256: str
  indices: tuple[int, ...]
  buckets: tuple[int, ...]

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), ensure_ascii=False) + "\n"

  @classmethod
  def read(cls, path: pathlib.Path) -> "Finished":
    """Reads what `to_json` returned.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is something else.
    """
    try:
      values = json.loads(path.read_text(encoding="utf-8"))
      return cls(
        cache_manifest.Shard(**values["shard"]),
        values["settings_sha256"],
        tuple(values["indices"]),
        tuple(values["buckets"]),
      )
    except (KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"{path} does not describe a shard ({error}); delete it and run the "
        "same command again."
      ) from error


class _Unreadable(NamedTuple):
  """A record that cannot be read, and why."""

  key: str
  reason: str


class _Example(NamedTuple):
  """A record of the source as it goes into the shard, but for text states."""

  key: str
  captions: tuple[records.Caption, ...]
  bucket: int
  latents: BFloat16[np.ndarray, "h w c"]


class Maker(NamedTuple):
  """Everything that shards are made from.

  Attributes:
    settings: those of the plan and the encoders.
    on_batch: told how many records of the source are done with.
  """

  source: records.Source
  plan: plan_lib.Plan
  encoders: encoders_lib.Encoders
  settings: cache_manifest.Settings
  on_batch: Callable[[int], None] = lambda count: None

  def find(self, number: int, path: pathlib.Path) -> Finished | None:
    """Returns a shard that need not be made; see `find`."""
    if self._makes_null_caption(number) and not (
      (path / cache.NULL_CAPTION).is_file()
    ):
      return None
    name = shard_name(number, self.plan.num_shards)
    return find(path, name, self.settings)

  def _makes_null_caption(self, number: int) -> bool:
    return number == 0 and self.encoders.text is not None

  def make(self, number: int, directory: storage.Directory) -> Finished:
    """Makes a shard and writes it.

    Raises:
      FloatingPointError: the states of a caption are not finite.
      OSError: something cannot be written, or the source not read.
    """
    if self._makes_null_caption(number):
      _write_null_caption(self.encoders, directory)
    examples, skipped = self._encode_pictures(number)
    captions = [c.text for e in examples.values() for c in e.captions]
    texts = encoders_lib.CaptionStates({}, 0)
    if self.encoders.text is not None:
      texts = self.encoders.encode_captions(captions)
    content = [
      _record(example, self.plan.shapes, texts)
      for _, example in sorted(examples.items())
    ]
    name = shard_name(number, self.plan.num_shards)
    size, digest = _write(directory, name, content)
    finished = Finished(
      cache_manifest.Shard(
        file=name,
        bytes=size,
        sha256=digest,
        records=len(content),
        skipped=skipped,
        captions=len(captions),
        truncated_captions=texts.truncated,
        latent_bytes=sum(record.latents.nbytes for record in content),
        text_bytes=sum(
          caption.states.nbytes
          for record in content
          for caption in record.captions
          if caption.states is not None
        ),
      ),
      self.settings.sha256(),
      tuple(sorted(examples)),
      tuple(example.bucket for _, example in sorted(examples.items())),
    )
    directory.write(sidecar_name(name), finished.to_json().encode())
    directory.sync()
    return finished

  def _encode_pictures(
    self, number: int
  ) -> tuple[dict[int, _Example], dict[str, str]]:
    """Returns examples by their number in the source, and why others fail."""
    examples: dict[int, _Example] = {}
    reasons: dict[int, tuple[str, str]] = {
      index: (access.key_of(self.source, index), self.plan.problems[index])
      for index in self.plan.indices(number)
      if index in self.plan.problems
    }
    if reasons:
      self.on_batch(len(reasons))
    for batch, read in self._pictures(self.plan.batches(number)):
      good = {}
      for index, (record, pixels) in zip(batch.indices, read, strict=True):
        if isinstance(pixels, str):
          reasons[index] = (record.key, pixels)
        else:
          good[index] = (record, pixels)
      if good:
        latents = self.encoders.encode_images(
          np.stack([pixels for _, pixels in good.values()])
        )
        for (index, (record, _)), row in zip(
          good.items(), latents, strict=True
        ):
          if np.isfinite(row.astype(np.float32)).all():
            examples[index] = _Example(
              record.key, record.captions, batch.bucket, row.copy()
            )
          else:
            reasons[index] = (record.key, "Its latents are not finite.")
      self.on_batch(len(batch.indices))
    return examples, {key: why for _, (key, why) in sorted(reasons.items())}

  def _pictures(
    self, batches: Sequence[plan_lib.Batch]
  ) -> Iterator[
    tuple[
      plan_lib.Batch,
      list[tuple[records.Record, UInt8[np.ndarray, "h w 3"] | str]],
    ]
  ]:
    """Reads and fits batches, one ahead of the one that is encoded."""

    def read(batch: plan_lib.Batch):
      shape = self.plan.shapes[batch.bucket]

      def fit(found: records.Record | _Unreadable):
        if isinstance(found, _Unreadable):
          return records.Record(found.key, b"", ()), found.reason
        return found, self.fit(found, shape)

      found = _read(self.source, batch.indices)
      return batch, list(workers.map(fit, found))

    with (
      futures.ThreadPoolExecutor(1) as reader,
      futures.ThreadPoolExecutor(os.cpu_count()) as workers,
    ):
      ahead = [reader.submit(read, batch) for batch in batches[:1]]
      for following in [*batches[1:], None]:
        if not ahead:
          return
        done = ahead.pop().result()
        if following is not None:
          ahead.append(reader.submit(read, following))
        yield done

  def fit(
    self, record: records.Record, shape: buckets.Shape
  ) -> UInt8[np.ndarray, "h w 3"] | str:
    """Returns the pixels that are encoded, or why there are none."""
    try:
      picture = transforms.decode(record.image)
    except ValueError as error:
      return str(error)
    return transforms.fit(picture, *shape, resample=self.settings.resample)


def shard_name(number: int, num_shards: int) -> str:
  return f"shard-{number:05d}-of-{num_shards:05d}.array_record"


def sidecar_name(name: str) -> str:
  """Names the description of a shard."""
  return pathlib.Path(name).with_suffix(".json").name


def find(
  path: pathlib.Path, name: str, settings: cache_manifest.Settings
) -> Finished | None:
  """Returns a shard that is there, as large as it should be; None: none is.

  Args:
    settings: one that was made with others is not there, either.

  Raises:
    ValueError: its description is broken.
  """
  try:
    found = Finished.read(path / sidecar_name(name))
    size = (path / name).stat().st_size if found.shard.records else 0
  except FileNotFoundError:
    return None
  same = found.settings_sha256 == settings.sha256()
  return found if same and size == found.shard.bytes else None


def _record(
  example: _Example,
  shapes: Sequence[buckets.Shape],
  texts: encoders_lib.CaptionStates,
) -> cache_records.Record:
  return cache_records.Record(
    key=example.key,
    size=shapes[example.bucket],
    latents=example.latents,
    captions=tuple(
      cache_records.Caption(c.name, c.text, c.score, texts.states.get(c.text))
      for c in example.captions
    ),
  )


def _write(
  directory: storage.Directory,
  name: str,
  content: Sequence[cache_records.Record],
) -> tuple[int, str]:
  """Writes a shard; returns its size and digest. Without records, no file."""
  if not content:
    return 0, hashlib.sha256().hexdigest()
  temporary = directory.temporary(name)
  with storage.removing_on_error(temporary, directory.path / name):
    file = storage.RecordFile(temporary, directory.path / name)
    for record in content:
      file.write(cache_records.encode(record))
    file.close()
    digest = hashlib.sha256()
    with temporary.open("rb") as written:
      while chunk := written.read(_HASH_CHUNK):
        digest.update(chunk)
    size = temporary.stat().st_size
    directory.publish(name)
  return size, digest.hexdigest()


def _write_null_caption(
  encoders: encoders_lib.Encoders, directory: storage.Directory
) -> None:
  buffer = io.BytesIO()
  np.save(buffer, encoders.null_caption().view(np.uint16))
  directory.write(cache.NULL_CAPTION, buffer.getvalue())


def _read(
  source: records.Source, indices: Sequence[int]
) -> list[records.Record | _Unreadable]:
  """Reads records together, or one by one where one of them cannot be.

  What the disk or the network does not give is asked for several times.

  Raises:
    OSError: it still does not give a record.
  """
  try:
    return list(retrying.call(lambda: source.__getitems__(list(indices))))
  except (OSError, ValueError):
    return [_read_one(source, index) for index in indices]


def _read_one(
  source: records.Source, index: int
) -> records.Record | _Unreadable:
  try:
    return retrying.call(lambda: source[index])
  except (OSError, ValueError) as error:
    key = access.key_of(source, index)
    if isinstance(error, ValueError) or _is_about_content(error):
      return _Unreadable(key, str(error))
    raise OSError(
      f"{key} of {source.name} cannot be read: {error}. It is not skipped, for "
      "another time it may be there: see to the disk or the network, and run "
      "the same command again."
    ) from error


def _is_about_content(error: OSError) -> bool:
  """Whether a decoder raised it, of bytes that were read.

  What systems raise has a number, and what clients of stores do is a subclass;
  Arrow, of damaged pages, raises an OSError that is neither.
  """
  plain = type(error) is OSError and error.errno is None
  return plain or isinstance(error, PIL.UnidentifiedImageError)
