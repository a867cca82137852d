"""Sizes of all pictures of a source, measured once and kept in a file."""

import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from concurrent import futures

import numpy as np
import tqdm
from etils import epath
from jaxtyping import Int32

from sana_jax.data import filtering, records, retrying, storage, transforms
from sana_jax.data.sources import access

# Enough for the size of nearly every JPEG, its EXIF data included.
_HEAD = 2**16
_CHUNK = 32
_FILES = 1024


@dataclasses.dataclass(frozen=True)
class Scan:
  """What is known of a source's pictures without decoding them.

  Attributes:
    height: after EXIF, in pixels; 0 where there is a problem.
    problem: why a picture's size cannot be read; None: it can.
    fingerprint: of the keys, in order.
    stamp: of the files that were there; empty: nobody looked. See `stamp`.
  """

  height: Int32[np.ndarray, "n"]
  width: Int32[np.ndarray, "n"]
  problem: list[str | None]
  fingerprint: str
  stamp: str = ""

  def __len__(self) -> int:
    return len(self.height)

  def to_bytes(self) -> bytes:
    """Returns the contents of an .npz file; only problems take much space."""
    places = [
      i for i, problem in enumerate(self.problem) if problem is not None
    ]
    buffer = io.BytesIO()
    np.savez_compressed(
      buffer,
      height=self.height,
      width=self.width,
      places=np.array(places, np.int64),
      # JSON: an array of strings pads all to the longest.
      problems=np.frombuffer(
        json.dumps([self.problem[i] for i in places]).encode(), np.uint8
      ),
      fingerprint=np.array(self.fingerprint),
      stamp=np.array(self.stamp),
    )
    return buffer.getvalue()

  @classmethod
  def from_bytes(cls, content: bytes) -> "Scan":
    """Reads what `to_bytes` returned.

    Raises:
      ValueError: it is something else.
    """
    try:
      with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        height = arrays["height"]
        problem: list[str | None] = [None] * len(height)
        texts = json.loads(arrays["problems"].tobytes())
        for place, text in zip(arrays["places"], texts, strict=True):
          problem[place] = text
        return cls(
          *(height, arrays["width"], problem),
          *(str(arrays[name]) for name in ("fingerprint", "stamp")),
        )
    except (
      *(ValueError, KeyError, IndexError, OSError, EOFError),
      zipfile.BadZipFile,
    ) as error:
      raise ValueError(f"not a scan ({error})") from error

  def save(self, path: epath.PathLike) -> None:
    """Writes an .npz file, there whole or not at all."""
    path = epath.Path(path)
    temporary = path.parent / f"{path.name}.tmp-{os.getpid()}"
    temporary.write_bytes(self.to_bytes())
    temporary.replace(path)


def load(path: epath.PathLike, source: records.Source) -> Scan:
  """Reads what `Scan.save` wrote of the same source.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a scan, or of a source with other keys.
  """
  path = epath.Path(path)
  try:
    result = Scan.from_bytes(path.read_bytes())
  except ValueError as error:
    raise ValueError(
      f"{path} is {error}: delete it, and scan again."
    ) from error
  found = fingerprint(keys(source))
  if result.fingerprint != found:
    raise ValueError(
      f"{path} is of {len(result)} records with other keys (fingerprint "
      f"{result.fingerprint[:12]}) than the {len(source)} of {source.name} "
      f"({found[:12]}): the data changed. Delete it, and scan again."
    )
  return result


def scan(
  source: records.Source,
  *,
  num_threads: int = 16,
  verify: bool = False,
  min_clip_score: float = 0.0,
  part: range | None = None,
) -> Scan:
  """Reads the header of every picture.

  Records that cannot be read do not end it; they have a `problem`. What the
  disk or the network does not give is asked for several times.

  Args:
    verify: decode the pictures as well, which finds those that are cut off.
    min_clip_score: see `filtering.require_score`; a lower one is a problem.
    part: only these records, from one to another; the fingerprint is that of
      the whole source all the same.
  """
  if num_threads < 1:
    raise ValueError(f"num_threads must be at least 1, got {num_threads}.")
  part = range(len(source)) if part is None else part
  chunks = [part[i : i + _CHUNK] for i in range(0, len(part), _CHUNK)]
  height, width, problem = [], [], []
  with (
    futures.ThreadPoolExecutor(num_threads) as pool,
    tqdm.tqdm(total=len(part), desc="scan", unit="img") as progress,
  ):
    for sizes in pool.map(
      lambda chunk: _measure(source, chunk, verify, min_clip_score), chunks
    ):
      for size, trouble in sizes:
        height.append(size[0])
        width.append(size[1])
        problem.append(trouble)
      progress.update(len(sizes))
  return Scan(
    np.array(height, np.int32),
    np.array(width, np.int32),
    problem,
    fingerprint(keys(source)),
  )


def problem(
  source: records.Source, index: int, min_clip_score: float
) -> str | None:
  """Says why `scan` leaves a record out that it only sees the header of."""
  part = range(index, index + 1)
  ((_, found),) = _measure(source, part, False, min_clip_score)
  return found


def join(parts: Sequence[Scan]) -> Scan:
  """Puts the scans of all parts of a source together.

  Raises:
    ValueError: they are of sources with different keys.
  """
  found = sorted({part.fingerprint[:12] for part in parts})
  if len(found) > 1:
    raise ValueError(
      f"the parts are of sources with different keys: fingerprints {found}."
    )
  return Scan(
    np.concatenate([part.height for part in parts]),
    np.concatenate([part.width for part in parts]),
    [problem for part in parts for problem in part.problem],
    parts[0].fingerprint,
  )


def fingerprint(names: Iterable[str]) -> str:
  """Returns a hash of keys and their order."""
  digest = hashlib.sha256()
  for key in names:
    content = key.encode()
    digest.update(len(content).to_bytes(8, "little") + content)
  return digest.hexdigest()


def stamp(source: records.Source, num_threads: int = 16) -> str:
  """Returns a hash of the sizes and times of a source's files.

  Another one tells that a picture or a caption may have been changed, though
  keys are the same. Empty where the source has no files.
  """
  if not isinstance(source, access.FileSource):
    return ""
  files = source.files()
  chunks = [files[i : i + _FILES] for i in range(0, len(files), _FILES)]
  with futures.ThreadPoolExecutor(max(num_threads, 1)) as pool:
    found = pool.map(lambda chunk: [_stamp_of(f) for f in chunk], chunks)
    return fingerprint(text for texts in found for text in texts)


def _stamp_of(file: storage.Location) -> str:
  try:
    return retrying.call(file.stamp)
  except OSError:  # That it cannot be read, a scan says.
    return "unreadable"


def _measure(
  source: records.Source, part: range, verify: bool, min_clip_score: float
) -> list[tuple[tuple[int, int], str | None]]:
  def measure(index: int) -> tuple[int, int]:
    size = _size(source, index)
    filtering.require_score(source, index, min_clip_score)
    if verify:
      transforms.decode(source[index].image)
    return size

  found = []
  for index in part:
    try:
      found.append((retrying.call(lambda i=index: measure(i)), None))
    except (OSError, ValueError) as error:
      found.append(((0, 0), str(error)))
  return found


def _size(source: records.Source, index: int) -> tuple[int, int]:
  # Sources of files can do with the beginning of one. PNG files may have EXIF
  # data at their end, and some formats are opened whole only.
  if isinstance(source, access.FileSource):
    head = source.image_head(index, _HEAD)
    if len(head) != _HEAD:
      return transforms.header(head)
    if head.startswith(b"\xff\xd8"):
      try:
        return transforms.header(head)
      except ValueError:
        pass  # Its size lies behind the head.
  return transforms.header(source[index].image)


def keys(source: records.Source) -> Iterable[str]:
  """Returns the keys of all records, in order."""
  if isinstance(source, access.FileSource):
    return source.keys()
  return (source[index].key for index in range(len(source)))
