"""Files that are there whole or not at all, whenever the process ends."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, BinaryIO

from array_record.python import array_record_module

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# File systems that have no hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)
_PREFIX = ".tmp-"
_SHOWN = 60
# Payloads do not compress further; groups of one let readers jump to any
# record.
_RECORD_OPTIONS = "group_size:1,uncompressed"
_ADVICE = "ake room and run the same command again; it goes on from there"


class Directory:
  """Writes files under temporary names and renames them when complete.

  Args:
    owner: hosts, by their number, and other workers that share a directory
      leave each other's temporary files alone.
  """

  def __init__(self, path: pathlib.Path, owner: int | str = 0):
    self.path = path
    if isinstance(owner, int):
      owner = f"{owner:05d}"
    self._prefix = f"{_PREFIX}{owner}-"

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
    f"Cannot write {path}: {os.strerror(error.errno)}. M{_ADVICE}",
  )


class RecordFile:
  """Writes an ArrayRecord file whose readers may jump to any record.

  Args:
    path: of the temporary file.
    becomes: the name that messages give it.

  Raises:
    OSError: it cannot be written; so do the methods.
  """

  def __init__(self, path: pathlib.Path, becomes: pathlib.Path):
    self._becomes = becomes
    self._records = self._call(
      array_record_module.ArrayRecordWriter, str(path), _RECORD_OPTIONS
    )

  def write(self, record: bytes) -> None:
    self._call(self._records.write, record)

  def close(self) -> None:
    self._call(self._records.close)

  def _call(self, function: Callable[..., Any], *args: str | bytes) -> Any:
    try:
      return function(*args)
    except RuntimeError as error:
      # The library has no error numbers, and a message of several parts.
      reason = str(error).split(";")[0]
      raise OSError(
        f"Cannot write {self._becomes}: {reason}. If the disk is full, "
        f"m{_ADVICE}"
      ) from error


def open_alone(path: pathlib.Path, advice: str) -> BinaryIO:
  """Opens a file for appending, without a buffer, for one process at a time.

  Args:
    advice: what to do if another process has it open.

  Raises:
    BlockingIOError: another process has.
  """
  file = path.open("ab", buffering=0)
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    file.close()
    raise BlockingIOError(
      f"Another process is writing {path}; {advice}."
    ) from error
  return file


def check_same(
  path: pathlib.Path,
  identity: Mapping[str, Any],
  *,
  program: str,
  advice: str,
  free: Collection[str] = (),
) -> None:
  """Compares a run's description with the one that is on disk.

  Args:
    path: JSON.
    identity: JSON values that a run and its continuation have in common.
    program: that writes such files.
    advice: what to do if they differ.
    free: names of values that may differ.

  Raises:
    FileExistsError: they do; says in what.
  """
  try:
    there = json.loads(path.read_text(encoding="utf-8"))
  except ValueError:
    there = None
  if not isinstance(there, dict):
    raise FileExistsError(
      f"{path} is not from {program}; use another directory."
    )
  differences = [
    f"{name} was {_short(there.get(name))}, is {_short(identity.get(name))}"
    for name in sorted((identity.keys() | there.keys()) - set(free))
    if there.get(name) != identity.get(name)
  ]
  if not differences:
    return
  raise FileExistsError(
    f"{path.parent} holds another run ({'; '.join(differences)}); {advice}."
  )


def _short(value: Any) -> str:
  text = json.dumps(value, ensure_ascii=False)
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
