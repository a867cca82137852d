"""A server that speaks the few words of the hub's protocol that matter."""

import contextlib
import hashlib
import http.server
import json
import re
import socket
import threading

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
  """The few requests that downloading a snapshot makes."""

  def do_HEAD(self):  # noqa: N802
    self.do_GET()

  def do_GET(self):  # noqa: N802
    self.server.requests.append(f"{self.command} {self.path}")
    path = self.path.partition("?")[0]
    repo, refused = self.server.repo, self.server.refused
    if repo not in path:
      self.refuse(404, "RepoNotFound")
    elif refused and refused[2] in path:
      self.refuse(*refused[:2])
    elif path.startswith(f"/api/models/{repo}/revision/"):
      if path.endswith("/main") or path.endswith(COMMIT):
        self.reply(json.dumps({"id": repo, "sha": COMMIT}).encode())
      else:
        self.refuse(404, "RevisionNotFound")
    elif path.startswith(f"/api/models/{repo}/tree/"):
      tree = [
        {"type": "file", "path": n, "size": len(c), "oid": etag(c)}
        for n, c in self.server.files.items()
      ]
      self.reply(json.dumps(tree).encode())
    else:
      revisions = rf"/{re.escape(repo)}/resolve/(?:main|{COMMIT})/"
      name = re.sub(revisions, "", path)
      self.reply(self.server.files[name])

  def reply(self, content: bytes):
    self.send_response(200)
    self.send_header("Content-Length", str(len(content)))
    self.send_header("Content-Type", "application/json")
    self.send_header("ETag", f'"{etag(content)}"')
    self.send_header("X-Repo-Commit", COMMIT)
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(content)

  def refuse(self, status: int, code: str):
    self.send_response(status)
    self.send_header("X-Error-Code", code)
    self.send_header("Content-Length", "0")
    self.end_headers()

  def log_message(self, *args):
    pass


def etag(content: bytes) -> str:
  return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serve(repo: str, files: dict[str, bytes]):
  """Yields a server of one repository; its `endpoint` is its address.

  `refused`, a tuple (status, error code, part of the path), makes it refuse.
  """
  made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  made.repo, made.files, made.refused, made.requests = repo, files, None, []
  made.endpoint = "http://{}:{}".format(*made.server_address)
  thread = threading.Thread(target=made.serve_forever)
  thread.start()
  try:
    yield made
  finally:
    made.shutdown()
    thread.join()
    made.server_close()


def unreachable() -> str:
  """An address where nobody listens."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"http://127.0.0.1:{free.getsockname()[1]}"
