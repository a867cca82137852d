"""The files that the page hands out: a private directory of bounded size."""

import asyncio
import contextlib
import pathlib
import re
import secrets
import tempfile
from collections.abc import AsyncIterator

_NAME_LENGTH = 48


class PageFiles:
  """A directory of this process alone, for results and uploads.

  The oldest files go when there are too many, or too many bytes. Names of
  results cannot be guessed, so that nobody gets another's pictures by trying.
  """

  def __init__(self, max_bytes: int = 2**30, max_files: int = 10_000):
    self.max_bytes = max_bytes
    self.max_files = max_files
    # Removed when the process ends, if not before.
    self._directory = tempfile.TemporaryDirectory(
      prefix="sana_jax_page_", ignore_cleanup_errors=True
    )
    self.path = pathlib.Path(self._directory.name).resolve()

  def add(self, name: str, data: bytes) -> str:
    """Writes a file and returns its path.

    Args:
      name: what it is called when it is downloaded; see `file_name`.
    """
    directory = self.path / secrets.token_urlsafe(16)
    directory.mkdir()
    path = directory / name
    path.write_bytes(data)
    return str(path)

  def trim(self) -> None:
    """Removes the oldest files until the others are few and small enough."""
    found = []
    for path in self.path.rglob("*"):
      # Others remove files too.
      with contextlib.suppress(FileNotFoundError):
        if path.is_file():
          status = path.stat()
          found.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for gone, (_, size, path) in enumerate(sorted(found)):
      if total <= self.max_bytes and len(found) - gone <= self.max_files:
        return
      path.unlink(missing_ok=True)
      with contextlib.suppress(OSError):  # not empty
        path.parent.rmdir()
      total -= size

  def remove(self) -> None:
    """Removes all files, and the directory."""
    self._directory.cleanup()

  @contextlib.asynccontextmanager
  async def kept_small(self, seconds: float = 10.0) -> AsyncIterator[None]:
    """Trims again and again; removes the directory at the end."""
    task = asyncio.create_task(self._trim_always(seconds))
    try:
      yield
    finally:
      task.cancel()
      with contextlib.suppress(asyncio.CancelledError):
        await task
      self.remove()

  async def _trim_always(self, seconds: float) -> None:
    while True:
      await asyncio.sleep(seconds)
      await asyncio.to_thread(self.trim)


def file_name(prompt: str, seed: int, image_index: int) -> str:
  """Makes a name of letters, digits and hyphens that says what is drawn."""
  words = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:_NAME_LENGTH].strip("-")
  return f"{words or 'image'}-{seed}-{image_index}.png"
