"""Files and directories on disks and in every store that fsspec knows."""

import dataclasses
import os
import posixpath
import re
from collections.abc import Iterator
from typing import IO, Any

import fsspec
from etils import epath

# Of files in stores, as fsspec's clients of them say it.
_STAMPS = (
  *("size", "mtime", "created", "updated", "LastModified", "last_modified"),
  *("etag", "ETag", "generation"),
)
_STARS = re.compile(r"[*?\[]")
_BRACES = re.compile(
  r"\{(?:(?P<first>\d+)\.\.(?P<last>\d+)|(?P<words>[^{},]+(?:,[^{},]*)+))\}"
)


@dataclasses.dataclass(frozen=True)
class Location:
  """A file or directory; may be pickled, holds nothing open.

  Attributes:
    filesystem: fsspec's; local paths have one too.
    path: as the file system writes it, separated by slashes.
  """

  filesystem: Any
  path: str

  @classmethod
  def of(cls, path: epath.PathLike) -> "Location":
    """Takes a local path or an address such as gs://bucket/directory.

    Raises:
      ValueError: no such store is known, or its package is not installed.
    """
    address = os.fspath(path)
    try:
      filesystem, path = fsspec.core.url_to_fs(address)
    except ImportError as error:
      raise ValueError(
        f"{address} cannot be read: {error}. pip install sana_jax[remote] "
        "installs what gs://, s3:// and http:// need."
      ) from error
    except ValueError as error:  # Of fsspec.
      raise ValueError(f"{address}: {error}.") from error
    return cls(filesystem, path.rstrip("/") or "/")

  @property
  def is_local(self) -> bool:
    return "file" in _protocols(self.filesystem)

  @property
  def name(self) -> str:
    """Its last part."""
    return posixpath.basename(self.path)

  def __str__(self) -> str:
    if self.is_local:
      return self.path
    return self.filesystem.unstrip_protocol(self.path)

  def __truediv__(self, name: str) -> "Location":
    return Location(self.filesystem, posixpath.join(self.path, name))

  def parent(self) -> "Location":
    return Location(self.filesystem, posixpath.dirname(self.path))

  def is_within(self, other: "Location") -> bool:
    """Returns whether it is `other`, or below it."""
    if self.filesystem != other.filesystem:
      return False
    paths = self.path, other.path
    if self.is_local:
      paths = tuple(map(os.path.realpath, paths))
    return f"{paths[0]}/".startswith(f"{paths[1].rstrip('/')}/")

  def is_file(self) -> bool:
    return self.filesystem.isfile(self.path)

  def is_dir(self) -> bool:
    return self.filesystem.isdir(self.path)

  def size(self) -> int:
    return self.filesystem.size(self.path)

  def stamp(self) -> str:
    """Returns what changes when the file is written: size and time or tag."""
    if self.is_local:
      found = os.stat(self.path)
      return f"{found.st_size} {found.st_mtime_ns}"
    info = self.filesystem.info(self.path)
    return " ".join(str(info[name]) for name in _STAMPS if name in info)

  def read(self, start: int | None = None, stop: int | None = None) -> bytes:
    """Reads the file, or some of its bytes."""
    return self.filesystem.cat_file(self.path, start, stop)

  def open(self) -> IO[bytes]:
    return self.filesystem.open(self.path, "rb")

  def files(self) -> list[str]:
    """Lists what is below the directory, sorted, relative to it.

    Hidden files are among them, see `is_hidden`.
    """
    found = (
      _walk(self.path) if self.is_local else self.filesystem.find(self.path)
    )
    start = len(self.path.rstrip("/")) + 1
    return sorted(path[start:] for path in found)

  def write(self, content: bytes) -> None:
    """Writes the file, and makes the directory it is in."""
    self.filesystem.makedirs(posixpath.dirname(self.path), exist_ok=True)
    self.filesystem.pipe_file(self.path, content)

  def children(self) -> list["Location"]:
    """Lists what is in the directory itself, sorted."""
    names = self.filesystem.ls(self.path, detail=False)
    return [Location(self.filesystem, name) for name in sorted(names)]

  def glob(self) -> list["Location"]:
    """Lists the files that the path, a pattern, stands for.

    What {00..15} and {a,b} stand for is listed whether it is there or not.

    Raises:
      ValueError: a range that runs backwards.
    """
    return [
      Location(self.filesystem, path)
      for pattern in _expand_braces(self.path)
      for path in (
        sorted(self.filesystem.glob(pattern))
        if _STARS.search(pattern)
        else [pattern]
      )
    ]


def _expand_braces(path: str) -> list[str]:
  """Returns the paths that {00..15} and {a,b} stand for, as a shell does."""
  match = _BRACES.search(path)
  if match is None:
    return [path]
  if match["first"] is None:
    words = match["words"].split(",")
  else:
    first, last, digits = match["first"], match["last"], len(match["first"])
    if int(first) > int(last):
      raise ValueError(
        f"{path} has the range {match[0]}: expected the smaller number first."
      )
    words = [f"{i:0{digits}}" for i in range(int(first), int(last) + 1)]
  before, after = path[: match.start()], path[match.end() :]
  return [
    expanded
    for word in words
    for expanded in _expand_braces(f"{before}{word}{after}")
  ]


def _walk(directory: str) -> Iterator[str]:
  """Yields files below a local directory, behind links too but never twice."""
  seen = set()
  for parent, directories, names in os.walk(directory, followlinks=True):
    real = os.path.realpath(parent)
    if real in seen:
      directories.clear()
      continue
    seen.add(real)
    yield from (posixpath.join(parent, name) for name in names)


def is_hidden(name: str) -> bool:
  """Returns whether a relative path is hidden (`.git`, `__MACOSX`, `.a`)."""
  return any(
    part.startswith(".") or part == "__MACOSX" for part in name.split("/")
  )


def is_pattern(path: str) -> bool:
  """Returns whether a path has stars, braces or other wild cards."""
  return bool(_STARS.search(path) or _BRACES.search(path))


def _protocols(filesystem: Any) -> tuple[str, ...]:
  protocol = filesystem.protocol
  return (protocol,) if isinstance(protocol, str) else tuple(protocol)
