"""The names that a server is called by, which tell its own pages from others.

A page of another site cannot read what it has a browser ask of this machine,
unless the site's name is made to mean this machine (DNS rebinding). The browser
then still asks for that name.
"""

import ipaddress
import re
from collections.abc import Callable, Collection

from starlette import datastructures, responses
from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("localhost", "127.0.0.1", "::1")
_NAME = re.compile(r"[\w.-]+", re.ASCII)
# A name, or an IPv6 address in brackets, and maybe a port.
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([\w.-]+))(?::\d{1,5})?", re.ASCII)


def is_loopback(host: str) -> bool:
  if _is_address(host):
    return ipaddress.ip_address(host).is_loopback
  return host == "localhost"


def check_name(name: str) -> None:
  """Refuses what no host is called by.

  Raises:
    ValueError: it has a port, a scheme or a path, or is empty.
  """
  if not _NAME.fullmatch(name) and not _is_address(name):
    raise ValueError(
      f"--allowed_host={name}: expected a name or an address alone, such as "
      "images.example.org, without a port, 'https://' or a path."
    )


def _is_address(host: str) -> bool:
  try:
    ipaddress.ip_address(host)
  except ValueError:
    return False
  return True


def _written(host: str) -> str:
  """Returns a name or an address as it is written, of several ways."""
  return str(ipaddress.ip_address(host)) if _is_address(host) else host.lower()


class HostCheck:
  """Middleware that refuses requests for hosts of other names.

  Args:
    hosts: names and addresses alone; see `check_name`.
    refuse: makes the answer of a path and a message.
  """

  def __init__(
    self,
    app: ASGIApp,
    hosts: Collection[str],
    refuse: Callable[[str, str], responses.Response],
  ):
    self._app = app
    self._hosts = frozenset(map(_written, hosts))
    self._refuse = refuse

  async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
      # As it was sent: a URL made of it may be of another host.
      sent = datastructures.Headers(scope=scope).get("host", "")
      match = _HOST.fullmatch(sent.lower())
      host = match and _written(match[1] or match[2])
      if host not in self._hosts:
        name = host or "HOST"
        refusal = self._refuse(
          scope["path"],
          f"There is no {sent[:100]!r} here. If it is a name of this server, "
          f"start it with --allowed_host={name[:100]}.",
        )
        await refusal(scope, receive, send)
        return
    await self._app(scope, receive, send)
