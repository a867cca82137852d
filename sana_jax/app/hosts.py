"""The names that a server is called by, which tell its own pages from others.

A page of another site cannot read what it has a browser ask of this machine,
unless the site's name is made to mean this machine (DNS rebinding). The browser
then still asks for that name.
"""

import ipaddress
import re
from collections.abc import Collection

from starlette import datastructures, responses
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
# A name, or an IPv6 address in brackets, and maybe a port.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII)


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
      # As it was sent: a URL made of it may be of another host.
      sent = datastructures.Headers(scope=scope).get("host", "")
      match = _HOST.fullmatch(sent.lower())
      host = match and (match[1] or match[2])
      if host not in self._hosts:
        name = host or "HOST"
        refusal = responses.PlainTextResponse(
          f"There is no {sent[:100]!r} here. If it is a name of this server, "
          f"start it with --allowed_host={name[:100]}.",
          421,
        )
        await refusal(scope, receive, send)
        return
    await self._app(scope, receive, send)
