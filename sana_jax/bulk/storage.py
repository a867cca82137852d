"""Files that are there whole or not at all, whenever the process ends."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# File systems that have no hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_PREFIX = ".tmp-"


class Directory:
  """Writes files under temporary names and renames them when complete.

  Args:
    host_index: hosts that share a directory leave each other's temporary files
      alone.
  """

  def __init__(self, path: pathlib.Path, host_index: int = 0):
    self.path = path
    self._prefix = f"{_PREFIX}{host_index:05d}-"

  def temporary(self, name: str) -> pathlib.Path:
    """Where the file is written before it gets its name."""
    return self.path / f"{self._prefix}{name}"

  def write(self, name: str, content: bytes) -> None:
    """Writes a file at once.

    Raises:
      OSError: it could not be written; then there is no such file, or the old
        one.
    """
    temporary = self.temporary(name)
    with removing_on_error(temporary, self.path / name):
      temporary.write_bytes(content)
      self.publish(name)

  def create(self, name: str, content: bytes) -> bool:
    """Writes a file at once, unless there is one; says whether it did.

    Of several processes that do it at the same time, one does (the last one
    wins where there are no hard links).

    Raises:
      OSError: it could not be written.
    """
    temporary = self.temporary(name)
    with removing_on_error(temporary, self.path / name):
      temporary.write_bytes(content)
      sync(temporary)
      try:
        os.link(temporary, self.path / name)
      except FileExistsError:
        return False
      except OSError as error:
        if error.errno not in _NO_LINKS:
          raise
        temporary.replace(self.path / name)
        return True
      finally:
        temporary.unlink(missing_ok=True)
    return True

  def publish(self, name: str) -> None:
    """Gives a finished temporary file its name."""
    temporary = self.temporary(name)
    sync(temporary)
    temporary.replace(self.path / name)

  def sync(self) -> None:
    """Makes sure that the names survive a power cut."""
    sync(self.path)

  def remove_temporary_files(self) -> None:
    for path in self.path.glob(f"{self._prefix}*"):
      path.unlink()


def sync(path: pathlib.Path) -> None:
  """Waits until a file's or a directory's content is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


@contextlib.contextmanager
def removing_on_error(
  temporary: pathlib.Path, path: pathlib.Path
) -> Iterator[None]:
  """Removes a half-written file; says what to do when the disk is full.

  Args:
    path: what it was to become.

  Raises:
    OSError: instead of the one that was raised, with more to say.
  """
  try:
    yield
  except OSError as error:
    temporary.unlink(missing_ok=True)
    raise explained(error, path) from error
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise


def explained(error: OSError, path: pathlib.Path) -> OSError:
  """Returns the error with what to do about a full disk."""
  if error.errno not in _FULL:
    return error
  return OSError(
    error.errno,
    f"Cannot write {path}: {os.strerror(error.errno)}. Make room and run the "
    "same command again; it goes on after the finished images",
  )
