"""Serves a page and an endpoint over HTTP, until told to stop."""

import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Collection

import fastapi
import uvicorn
from absl import logging
from starlette import responses
from uvicorn.protocols.http import h11_impl

from sana_jax import termination
from sana_jax.app import hosts, openai_api, page
from sana_jax.app.service import Service

# For the head of a request to arrive.
_HEAD_SECONDS = 20.0
# For answers on their way, once nothing is made any more.
_LAST_SECONDS = 5
_MAX_CONNECTIONS = 512
_ELSEWHERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def make_app(
  service: Service,
  *,
  api_key: str | None = None,
  with_page: bool = True,
  host_names: Collection[str] | None = None,
) -> fastapi.FastAPI:
  """Returns the ASGI application; its `state` has what `Server` calls.

  Args:
    api_key: see `openai_api.install`; the page needs none.
    with_page: at "/".
    host_names: what the server may be called by its clients; None: anything.
  """
  app = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
  openai_api.install(app, service, api_key=api_key)
  if host_names is not None:
    app.add_middleware(hosts.HostCheck, hosts=host_names, refuse=_misdirected)
  app.state.end_streams = app.state.remove_files = lambda: None
  if with_page:
    mounted = page.mount(app, service)
    app.state.end_streams = mounted.end_streams
    app.state.remove_files = mounted.remove_files
  return app


def _misdirected(path: str, message: str) -> responses.Response:
  if f"{path}/".startswith(openai_api.ROOT):
    return openai_api.refusal(421, message)
  return responses.PlainTextResponse(message, 421)


def bind(host: str, port: int) -> list[socket.socket]:
  """Takes a port, at which `Server` will listen.

  At once, since loading a model takes long.

  Args:
    host: an address, or a name that may have several of them.
    port: 0: any that is free.

  Raises:
    OSError: it cannot be listened at.
  """
  try:
    return _bind_all(host, port)
  except OSError as error:
    advice = "Choose an address of this machine as --host"
    if error.errno in (errno.EADDRINUSE, errno.EACCES):
      advice = "End what listens there, or choose another --port"
    raise OSError(
      f"Cannot listen at {host}, port {port}: {error.strerror}. {advice}."
    ) from error


def _bind_all(host: str, port: int) -> list[socket.socket]:
  # Some files of hosts have a name twice.
  addresses = dict.fromkeys(
    socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
  )
  bound: list[socket.socket] = []
  with contextlib.ExitStack() as opened:
    elsewhere = None
    for family, kind, protocol, _, address in addresses:
      try:
        one = _bind_one(family, kind, protocol, address)
        bound.append(opened.enter_context(one))
      except OSError as error:
        # A name may have addresses of another machine or protocol besides.
        if error.errno not in _ELSEWHERE:
          raise
        elsewhere = error
    if not bound:
      raise elsewhere
    opened.pop_all()
  return bound


def _bind_one(
  family: int, kind: int, protocol: int, address: tuple[str | int, ...]
) -> socket.socket:
  with contextlib.ExitStack() as opened:
    one = opened.enter_context(socket.socket(family, kind, protocol))
    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:  # IPv4 has a socket of its own
      one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    one.bind(address)
    opened.pop_all()
  return one


class Server(uvicorn.Server):
  """Ends as its service ends: with an answer to everyone who waits.

  Args:
    grace_seconds: for requests that wait when SIGTERM or SIGINT comes.
  """

  def __init__(
    self,
    app: fastapi.FastAPI,
    service: Service,
    *,
    grace_seconds: float,
  ):
    super().__init__(
      uvicorn.Config(
        app,
        http=_ImpatientProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_graceful_shutdown=_LAST_SECONDS,
      )
    )
    self._end_streams = app.state.end_streams
    self._remove_files = app.state.remove_files
    self._service = service
    self._grace_seconds = grace_seconds
    self._closer: threading.Thread | None = None
    self.ended_cleanly = True

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    try:
      for one in sockets or ():  # not every event loop would say
        one.listen(self.config.backlog)
    except OSError as error:  # somebody was faster while the model was loaded
      logging.error("cannot listen: %s", error.strerror)
      self.should_exit = True
      return
    await super().startup(sockets)
    for server in self.servers:
      for open_socket in server.sockets:
        host, port = open_socket.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        logging.info("listening at http://%s:%d", host, port)

  async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
    self._end_streams()
    await super().shutdown(sockets)

  def handle_exit(self, sig: int, frame: object) -> None:
    """Begins to end; a second signal ends at once.

    Until the service has ended, the port stays open, so that late requests are
    told why they are refused.
    """
    del frame
    if self._closer is not None:
      try:
        self._remove_files()  # nothing that does so at an exit will run
      finally:
        termination.end_at_once("sana_jax.app", sig)
    logging.info(
      "%s: ending; what waits has %.0f s",
      signal.Signals(sig).name,
      self._grace_seconds,
    )
    self._closer = threading.Thread(target=self._close, name="closer")
    self._closer.start()

  def _close(self) -> None:
    self.ended_cleanly = self._service.close(self._grace_seconds)
    self.should_exit = True


class _ImpatientProtocol(h11_impl.H11Protocol):
  """Hangs up on clients that do not finish the head of their request."""

  _timer = None

  def connection_made(self, transport) -> None:
    super().connection_made(transport)
    self._watch()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._watch()

  def connection_lost(self, exc) -> None:
    self._stop()
    super().connection_lost(exc)

  def _watch(self) -> None:
    at_work = self.cycle is not None and not self.cycle.response_complete
    if at_work:
      self._stop()
    elif self._timer is None:
      self._timer = self.loop.call_later(_HEAD_SECONDS, self.transport.close)

  def _stop(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None
