"""JSON from a client that may be slow, wrong or hostile."""

import asyncio
import json
from typing import Any

import fastapi

# Prompts, and what else there is, but for pictures.
MAX_BODY_BYTES = 256 * 1024
_READ_SECONDS = 20.0
# Of pictures, for slow lines: 27 MB are 1.8 Mbit/s.
_READ_SECONDS_OF_PICTURES = 120.0


class BodyError(ValueError):
  """A body that is not taken.

  Attributes:
    status: of the response.
  """

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


async def read_object(
  request: fastapi.Request, max_bytes: int = MAX_BODY_BYTES
) -> dict[str, Any]:
  """Reads a JSON object, and never more than `max_bytes`.

  Raises:
    BodyError: another type, too large, too slow, or no JSON object.
  """
  kind = request.headers.get("content-type", "").partition(";")[0]
  # Anything else a foreign web page could have a browser send.
  if kind.strip().lower() != "application/json":
    raise BodyError(
      415, f"The content type is {kind[:80]!r}; expected 'application/json'."
    )
  seconds = _READ_SECONDS
  if max_bytes > MAX_BODY_BYTES:
    seconds = _READ_SECONDS_OF_PICTURES
  try:
    body = await asyncio.wait_for(_read(request, max_bytes), seconds)
  except TimeoutError as error:
    raise BodyError(
      408, f"The body did not arrive within {seconds:.0f} s."
    ) from error
  # Of megabytes it takes a while.
  return await asyncio.to_thread(_parse, body)


def is_large(request: fastapi.Request) -> bool:
  """Whether a body is said to be more than `MAX_BODY_BYTES`."""
  said = request.headers.get("content-length", "")
  return said.isdigit() and (len(said) > 12 or int(said) > MAX_BODY_BYTES)


async def _read(request: fastapi.Request, max_bytes: int) -> bytes:
  too_large = BodyError(
    413, f"The body is too large; at most {max_bytes} bytes are read."
  )
  said = request.headers.get("content-length", "0")
  if not said.isdigit() or len(said) > 12 or int(said) > max_bytes:
    raise too_large
  body = bytearray()
  async for chunk in request.stream():
    body += chunk
    if len(body) > max_bytes:
      raise too_large
  return bytes(body)


def _parse(body: bytes) -> dict[str, Any]:
  def refuse(constant: str):
    raise ValueError(f"{constant} is no JSON number")

  def whole(digits: str) -> int:
    try:
      return int(digits)
    except ValueError as error:  # Python's advice is for programs
      raise ValueError(f"a number has {len(digits)} digits") from error

  try:
    value = json.loads(
      body.decode("utf-8"), parse_constant=refuse, parse_int=whole
    )
  except RecursionError as error:
    raise BodyError(400, "The body is nested too deeply.") from error
  except ValueError as error:
    raise BodyError(
      400, f"The body is not valid JSON: {str(error)[:200]}."
    ) from error
  if not isinstance(value, dict):
    raise BodyError(400, "The body must be a JSON object.")
  return value
