"""Uploads on their way to Gradio: small, few and in time, or refused.

Gradio bounds each file of an upload, not the upload, and waits forever.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import fastapi
from python_multipart import multipart

from sana_jax.app import bodies

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# For slow lines: 20 MB are 1.3 Mbit/s.
_SECONDS = 120.0
# A field of the page takes one, and a painting has a few layers.
_MAX_FILES = 4
# Of the lines between the files.
_OVERHEAD = 16 * 1024


class Upload:
  """A request with a multipart body, which is handed on as it arrives.

  Args:
    request: nothing was read of it.
    max_bytes: of its files together.

  Raises:
    BodyError: it says that it is too large, or is no upload.
  """

  def __init__(self, request: fastapi.Request, max_bytes: int):
    self._scope, self._receive = request.scope, request.receive
    self._max_bytes = max_bytes
    self._left = max_bytes + _OVERHEAD
    said = request.headers.get("content-length", "0")
    if not said.isdigit() or len(said) > 12 or int(said) > self._left:
      raise self._too_large()
    # As Gradio reads it. It stands before each file, and after the last.
    kind = request.headers.get("content-type", "")
    _, options = multipart.parse_options_header(kind)
    if not options.get(b"boundary"):
      raise bodies.BodyError(
        415, "The content type is not 'multipart/form-data' with a boundary."
      )
    self._boundary = b"--" + options[b"boundary"]
    self._boundaries = 0
    self._tail = b""
    self._is_whole = False
    self._end = time.monotonic() + _SECONDS
    self._refused: bodies.BodyError | None = None

  async def hand_on(self, app: App, send: Send) -> None:
    """Has an application answer, unless the body is refused on the way.

    Raises:
      BodyError: too large, too many files, too slow, or not all there.
    """

    async def send_unless_refused(message: MutableMapping[str, Any]) -> None:
      if self._refused is None:
        await send(message)

    try:
      await app(self._scope, self._receive_some, send_unless_refused)
    except Exception:
      if self._refused is None:
        raise
    if self._refused is not None:
      raise self._refused

  async def _receive_some(self) -> MutableMapping[str, Any]:
    try:
      return await self._checked()
    except bodies.BodyError as error:
      self._refused = error
      raise

  async def _checked(self) -> MutableMapping[str, Any]:
    if self._is_whole:
      return await self._receive()
    try:
      message = await asyncio.wait_for(
        self._receive(), self._end - time.monotonic()
      )
    except TimeoutError as error:
      raise bodies.BodyError(
        408, f"The upload did not arrive within {_SECONDS:.0f} s."
      ) from error
    if message["type"] == "http.disconnect":
      raise bodies.BodyError(400, "The upload ended before it was whole.")
    data = message.get("body", b"")
    self._left -= len(data)
    if self._left < 0:
      raise self._too_large()
    self._count(data)
    self._is_whole = not message.get("more_body", False)
    return message

  def _count(self, data: bytes) -> None:
    """Counts the files, whose boundaries may lie across two messages."""
    seen = self._tail + data
    self._boundaries += seen.count(self._boundary)
    self._tail = seen[max(0, len(seen) - len(self._boundary) + 1) :]
    if self._boundaries > _MAX_FILES + 1:
      raise bodies.BodyError(
        413, f"An upload may have {_MAX_FILES} files; send fewer at a time."
      )

  def _too_large(self) -> bodies.BodyError:
    return bodies.BodyError(
      413, f"The upload is too large; at most {self._max_bytes} bytes are read."
    )
