"""Files and directories on disks and in every store that fsspec knows."""

import dataclasses
import os
import posixpath
from collections.abc import Iterator
from typing import IO, Any

import fsspec
from etils import epath


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
    """Takes a local path or an address such as gs://bucket/directory."""
    filesystem, path = fsspec.core.url_to_fs(os.fspath(path))
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

  def is_file(self) -> bool:
    return self.filesystem.isfile(self.path)

  def is_dir(self) -> bool:
    return self.filesystem.isdir(self.path)

  def size(self) -> int:
    return self.filesystem.size(self.path)

  def read(self, start: int | None = None, stop: int | None = None) -> bytes:
    """Reads the file, or some of its bytes."""
    return self.filesystem.cat_file(self.path, start, stop)

  def open(self) -> IO[bytes]:
    return self.filesystem.open(self.path, "rb")

  def files(self) -> list[str]:
    """Lists what is below the directory, sorted, relative to it.

    Hidden files and directories (`.git`, `.DS_Store`, `__MACOSX`) are left out.
    """
    found = (
      _walk(self.path) if self.is_local else self.filesystem.find(self.path)
    )
    start = len(self.path.rstrip("/")) + 1
    return sorted(
      name
      for name in (path[start:] for path in found)
      if not any(
        part.startswith(".") or part == "__MACOSX" for part in name.split("/")
      )
    )

  def children(self) -> list["Location"]:
    """Lists what is in the directory itself, sorted."""
    names = self.filesystem.ls(self.path, detail=False)
    return [Location(self.filesystem, name) for name in sorted(names)]

  def glob(self) -> list["Location"]:
    """Lists the files that the path, a pattern with stars, stands for."""
    return [
      Location(self.filesystem, path)
      for path in sorted(self.filesystem.glob(self.path))
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


def has_stars(path: str) -> bool:
  return any(character in path for character in "*?[")


def _protocols(filesystem: Any) -> tuple[str, ...]:
  protocol = filesystem.protocol
  return (protocol,) if isinstance(protocol, str) else tuple(protocol)
