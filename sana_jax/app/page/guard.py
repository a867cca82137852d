"""Between the network and Gradio: only what the page needs gets through.

Gradio has routes for much else: fetching addresses on behalf of a visitor,
editing the program, recording, monitoring, calling methods of components. None
of them is of use to this page, so none is reachable. And where an event names a
file, Gradio (6.31, mounted) takes any path of this machine, and fetches any
address: here, only what was uploaded is let through.
"""

import json
import pathlib
from collections.abc import Iterator, MutableMapping
from typing import Any

import fastapi
from fastapi import responses

from sana_jax.app import bodies
from sana_jax.app.page import upload_body
from sana_jax.app.page.upload_body import App, Receive, Scope, Send

_API = "/gradio_api"
_EVENTS = f"{_API}/queue/join"
_UPLOAD = f"{_API}/upload"
_PATHS = frozenset(
  {
    *("/", "/config", "/theme.css", "/favicon.ico", "/manifest.json"),
    *("/robots.txt", f"{_API}/app_id", f"{_API}/startup-events"),
    *(_EVENTS, f"{_API}/queue/data", f"{_API}/cancel"),
    *(_UPLOAD, f"{_API}/upload_progress", f"{_API}/reset"),
  }
)
_FOLDERS = ("/assets/", "/static/", "/svelte/", f"{_API}/heartbeat/")
# Gradio's own scripts are inline and compile templates; nothing comes from, or
# goes to, another host.
_POLICY = "; ".join(
  [
    "default-src 'self'",
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
    "style-src 'self' 'unsafe-inline'",
    "img-src 'self' data: blob:",
    "connect-src 'self' data: blob:",
    "font-src 'self' data:",
    "worker-src 'self' blob:",
    "object-src 'none'",
    "base-uri 'self'",
    "form-action 'self'",
    "frame-ancestors 'self'",
  ]
)
_HEADERS = (
  (b"content-security-policy", _POLICY.encode()),
  (b"referrer-policy", b"no-referrer"),
  (b"x-content-type-options", b"nosniff"),
)


def is_needed(path: str, files: pathlib.Path) -> bool:
  """Says whether the page needs a route.

  Args:
    path: of the request, decoded.
    files: the only directory that files are served from.
  """
  if path in _PATHS:
    return True
  if ".." in path:
    return False
  return path.startswith((*_FOLDERS, f"{_API}/file={files}/"))


def names_foreign_files(event: Any, files: pathlib.Path) -> bool:
  """Says whether an event names a file that was not uploaded or made here."""
  inside = f"{files}/"
  return any(
    not isinstance(path, str) or not path.startswith(inside) or ".." in path
    for path in _paths(event)
  )


def guard(app: App, files: pathlib.Path, max_upload_bytes: int) -> App:
  """Wraps Gradio's application; other routes are not found.

  Args:
    files: the only directory that files are served from.
    max_upload_bytes: of one upload.
  """

  async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
    async def send_with_headers(message: MutableMapping[str, Any]) -> None:
      if message["type"] == "http.response.start":
        message["headers"] = [*message.get("headers", ()), *_HEADERS]
      await send(message)

    if scope["type"] != "http":
      await app(scope, receive, send)
      return
    request = fastapi.Request(scope, receive)
    try:
      _check(request, files)
      if scope["path"] == _EVENTS:
        body = await _read_event(request, files)
        receive = _again(body, receive)
      if scope["path"] == _UPLOAD and request.method == "POST":
        upload = upload_body.Upload(request, max_upload_bytes)
        await upload.hand_on(app, send_with_headers)
        return
    except bodies.BodyError as error:
      # What is left of the body is not worth reading.
      close = {"Connection": "close"}
      refusal = responses.PlainTextResponse(str(error), error.status, close)
      await refusal(scope, receive, send_with_headers)
    else:
      await app(scope, receive, send_with_headers)

  return guarded


def _check(request: fastapi.Request, files: pathlib.Path) -> None:
  if not is_needed(request.scope["path"], files):
    raise bodies.BodyError(404, "Not found.")
  # Browsers say so, whatever a proxy makes of the other headers.
  crosses = request.headers.get("sec-fetch-site") == "cross-site"
  if crosses and request.method != "GET":
    raise bodies.BodyError(403, "This was sent by a page of another site.")


async def _read_event(request: fastapi.Request, files: pathlib.Path) -> bytes:
  """Returns an event as it is understood here, so that Gradio agrees."""
  event = await bodies.read_object(request)
  try:
    foreign = names_foreign_files(event, files)
    body = json.dumps(event).encode()
  except RecursionError as error:
    raise bodies.BodyError(400, "The event is nested too deeply.") from error
  if foreign:
    raise bodies.BodyError(
      400, "Only files that were uploaded here can be used."
    )
  return body


def _again(body: bytes, receive: Receive) -> Receive:
  """Returns a `receive` that begins with the body that was read."""
  messages = [{"type": "http.request", "body": body, "more_body": False}]

  async def receive_again() -> MutableMapping[str, Any]:
    return messages.pop() if messages else await receive()

  return receive_again


def _paths(value: Any) -> Iterator[Any]:
  """Yields the paths of all files in an event, however deep."""
  if isinstance(value, dict):
    if value.get("path") is not None:
      yield value["path"]
    value = list(value.values())
  if isinstance(value, list):
    for item in value:
      yield from _paths(item)
