"""Sizes of all pictures of a source, measured once and kept in a file."""

import dataclasses
import hashlib
import io
import os
from collections.abc import Iterable
from concurrent import futures

import numpy as np
import tqdm
from etils import epath
from jaxtyping import Int32

from sana_jax.data import records, transforms
from sana_jax.data.sources import access

# Enough for the size of nearly every JPEG, its EXIF data included.
_HEAD = 2**16
_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class Scan:
  """What is known of a source's pictures without decoding them.

  Attributes:
    height: after EXIF, in pixels; 0 where there is a problem.
    problem: why a picture's size cannot be read; None: it can.
    fingerprint: of the keys, in order.
  """

  height: Int32[np.ndarray, "n"]
  width: Int32[np.ndarray, "n"]
  problem: list[str | None]
  fingerprint: str

  def __len__(self) -> int:
    return len(self.height)

  def save(self, path: epath.PathLike) -> None:
    """Writes an .npz file, there whole or not at all."""
    path = epath.Path(path)
    buffer = io.BytesIO()
    np.savez_compressed(
      buffer,
      height=self.height,
      width=self.width,
      problem=np.array([p or "" for p in self.problem], np.str_),
      fingerprint=np.array(self.fingerprint),
    )
    temporary = path.parent / f"{path.name}.tmp-{os.getpid()}"
    temporary.write_bytes(buffer.getvalue())
    temporary.replace(path)


def load(path: epath.PathLike, source: records.Source) -> Scan:
  """Reads what `Scan.save` wrote of the same source.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is not a scan, or of a source with other keys.
  """
  path = epath.Path(path)
  content = path.read_bytes()
  try:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
      result = Scan(
        arrays["height"],
        arrays["width"],
        [str(problem) or None for problem in arrays["problem"]],
        str(arrays["fingerprint"]),
      )
  except (ValueError, KeyError, OSError, EOFError) as error:
    raise ValueError(
      f"{path} is not a scan ({error}): delete it, and scan again."
    ) from error
  found = fingerprint(_keys(source))
  if result.fingerprint != found:
    raise ValueError(
      f"{path} is of {len(result)} records with other keys (fingerprint "
      f"{result.fingerprint[:12]}) than the {len(source)} of {source.name} "
      f"({found[:12]}): the data changed. Delete it, and scan again."
    )
  return result


def scan(
  source: records.Source, *, num_threads: int = 16, verify: bool = False
) -> Scan:
  """Reads the header of every picture.

  Records that cannot be read do not end it; they have a `problem`.

  Args:
    verify: decode the pictures as well, which finds those that are cut off.
  """
  if num_threads < 1:
    raise ValueError(f"num_threads must be at least 1, got {num_threads}.")
  starts = range(0, len(source), _CHUNK)
  height, width, problem = [], [], []
  with (
    futures.ThreadPoolExecutor(num_threads) as pool,
    tqdm.tqdm(total=len(source), desc="scan", unit="img") as progress,
  ):
    for sizes in pool.map(
      lambda start: _measure(source, start, verify), starts
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
    fingerprint(_keys(source)),
  )


def fingerprint(keys: Iterable[str]) -> str:
  """Returns a hash of keys and their order."""
  digest = hashlib.sha256()
  for key in keys:
    content = key.encode()
    digest.update(len(content).to_bytes(8, "little") + content)
  return digest.hexdigest()


def _measure(
  source: records.Source, start: int, verify: bool = False
) -> list[tuple[tuple[int, int], str | None]]:
  found = []
  for index in range(start, min(start + _CHUNK, len(source))):
    try:
      size = _size(source, index)
      if verify:
        transforms.decode(source[index].image)
      found.append((size, None))
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


def _keys(source: records.Source) -> Iterable[str]:
  if isinstance(source, access.FileSource):
    return source.keys()
  return (source[index].key for index in range(len(source)))
