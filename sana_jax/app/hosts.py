"""The names that a server is called by, which tell its own pages from others.

A page of another site cannot read what it has a browser ask of this machine,
unless the site's name is made to mean this machine (DNS rebinding). The browser
then still asks for that name.
"""

import ipaddress
from collections.abc import Collection

import fastapi
from fastapi import responses
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def is_loopback(host: str) -> bool:
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == "localhost"


class HostCheck:
  """Middleware that refuses requests for hosts of other names."""

  def __init__(self, app: ASGIApp, hosts: Collection[str]):
    self._app = app
    self._hosts = frozenset(host.lower() for host in hosts)

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
      host = fastapi.Request(scope).url.hostname
      if host not in self._hosts:
        refusal = responses.PlainTextResponse(
          f"There is no {host} here. If it is a name of this server, start it "
          f"with --allowed_host={host}.",
          421,
        )
        await refusal(scope, receive, send)
        return
    await self._app(scope, receive, send)
