"""What of the page can be reached over HTTP, and what cannot."""

import asyncio

import pytest

pytest.importorskip("gradio")

from fastapi import testclient  # noqa: E402

from sana_jax.app import limits, server, service  # noqa: E402
from sana_jax.app.page import upload_body  # noqa: E402
from tests import tiny  # noqa: E402

pytestmark = pytest.mark.ui


@pytest.fixture(scope="module")
def client(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(directory)
  served = service.Service(tiny.make_pipeline(directory))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("GRADIO_TEMP_DIR", "")  # which mounting sets
    with testclient.TestClient(server.make_app(served)) as client:
      yield client
  assert served.close()


def test_the_page_is_served_with_its_policy(client):
  answer = client.get("/")
  assert answer.status_code == 200
  policy = answer.headers["content-security-policy"]
  assert policy.startswith("default-src 'self'")
  assert "http" not in policy


@pytest.mark.parametrize(
  "path",
  [
    *("monitoring", "gradio_api/info", "gradio_api/openapi.json"),
    *("gradio_api/runs", "gradio_api/component_server", "login"),
    *("gradio_api/proxy=https://example.org/", "gradio_api/deep_link"),
    *("gradio_api/file=/etc/passwd", "gradio_api/file=https://example.org/"),
    *("gradio_api/vibe-code", "gradio_api/run/predict", "custom_component/1"),
  ],
)
def test_nothing_but_the_page_is_served(client, path):
  answer = client.get(f"/{path}")
  assert (answer.status_code, answer.text) == (404, "Not found.")


def test_health_can_be_looked_at_and_not_changed(client):
  looked = client.get("/health")
  head = client.head("/health")
  assert (looked.status_code, head.status_code) == (200, 200)
  assert looked.json() == {"status": "ok", "waiting": 0}
  assert (head.content, head.headers["content-length"]) == (
    *(b"", str(len(looked.content))),
  )
  for method in ("POST", "DELETE"):
    answer = client.request(method, "/health")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")
    assert f"no {method}" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1", "/v1/", "/v1/nothing"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_the_api_has_not_is_not_asked_of_the_page(client, method, path):
  answer = client.request(method, path, follow_redirects=False)
  assert answer.status_code == 404
  message = answer.json()["error"]["message"]
  assert message == f"There is no {method} {path} here."


def _event(client, **file):
  """Returns what the page would send of a file that was handed in."""
  config = client.get("/config").json()
  ids = {c["props"].get("elem_id"): c["id"] for c in config["components"]}
  (number,) = (
    d["id"]
    for d in config["dependencies"]
    if [ids["from_image"], "upload"] in d["targets"]
  )
  return {
    "data": [{**file, "meta": {"_type": "gradio.FileData"}}],
    "fn_index": number,
    "session_hash": "abc",
  }


@pytest.mark.parametrize(
  "path", ["/etc/passwd", "https://example.org/a.png", "../../etc/passwd"]
)
def test_an_event_can_name_uploads_only(client, path):
  answer = client.post("/gradio_api/queue/join", json=_event(client, path=path))
  assert answer.status_code == 400
  assert "uploaded here" in answer.text


def test_an_event_with_an_upload_is_taken(client):
  files = {"files": ("a.png", b"no picture")}
  (path,) = client.post("/gradio_api/upload", files=files).json()
  answer = client.post("/gradio_api/queue/join", json=_event(client, path=path))
  assert answer.status_code == 200


def test_an_upload_is_bounded(client):
  data = bytes(limits.Limits().max_upload_bytes + 1)
  answer = client.post("/gradio_api/upload", files={"files": ("a.png", data)})
  assert answer.status_code == 413


def test_uploads_at_once_are_few_and_together_no_larger_than_one(client):
  half = bytes(limits.Limits().max_upload_bytes // 2 + 20_000)
  for data, count, status in (
    *((b"a", 4, 200), (b"a", 5, 413), (b"a", 900, 413)),
    *((half, 1, 200), (half, 2, 413)),
  ):
    files = [("files", (f"{i}.png", data)) for i in range(count)]
    answer = client.post("/gradio_api/upload", files=files)
    assert answer.status_code == status, (len(data), count)


def _send_upload(client, messages, caplog):
  """Sends an upload message by message; returns what is answered."""
  answers = []
  waiting = list(messages)

  async def receive():
    if not waiting:
      await asyncio.sleep(3600)
    return waiting.pop(0)

  async def send(message):
    answers.append(message)

  scope = {
    "type": "http",
    "asgi": {"version": "3.0"},
    "http_version": "1.1",
    "method": "POST",
    "scheme": "http",
    "path": "/gradio_api/upload",
    "raw_path": b"/gradio_api/upload",
    "query_string": b"",
    "root_path": "",
    "headers": [(b"content-type", b"multipart/form-data; boundary=xyz")],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 80),
  }
  client.portal.call(client.app, scope, receive, send)
  assert "Traceback" not in caplog.text
  start, body = answers
  return start["status"], body["body"].decode()


_PART = (
  b'--xyz\r\nContent-Disposition: form-data; name="files"; '
  b'filename="a.png"\r\n\r\nabc'
)


def _chunk(data, more=True):
  return {"type": "http.request", "body": data, "more_body": more}


def test_a_slow_upload_is_hung_up_on(client, caplog, monkeypatch):
  monkeypatch.setattr(upload_body, "_SECONDS", 0.2)
  answer = _send_upload(client, [_chunk(_PART)], caplog)
  assert answer == (408, "The upload did not arrive within 0 s.")


def test_an_upload_that_is_given_up_is_no_error_of_the_server(client, caplog):
  messages = [_chunk(_PART), {"type": "http.disconnect"}]
  status, _ = _send_upload(client, messages, caplog)
  assert status == 400


def test_files_are_counted_across_messages(client, caplog):
  whole = (_PART + b"\r\n") * 5 + b"--xyz--\r\n"
  pieces = [whole[i : i + 3] for i in range(0, len(whole), 3)]
  messages = [_chunk(piece) for piece in pieces] + [_chunk(b"", more=False)]
  status, text = _send_upload(client, messages, caplog)
  assert (status, "4 files" in text) == (413, True)
  whole = (_PART + b"\r\n") * 4 + b"--xyz--\r\n"
  pieces = [whole[i : i + 3] for i in range(0, len(whole), 3)]
  messages = [_chunk(piece) for piece in pieces] + [_chunk(b"", more=False)]
  assert _send_upload(client, messages, caplog)[0] == 200


def test_an_upload_of_unknown_length_is_bounded(client, caplog):
  size = limits.Limits().max_upload_bytes // 10
  messages = [_chunk(_PART), *[_chunk(bytes(size))] * 11]
  assert _send_upload(client, messages, caplog)[0] == 413


@pytest.mark.parametrize("path", ["upload", "queue/join"])
def test_other_sites_cannot_send_anything(client, path):
  answer = client.post(
    f"/gradio_api/{path}", json={}, headers={"sec-fetch-site": "cross-site"}
  )
  assert answer.status_code == 403
