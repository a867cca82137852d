"""What of the page can be reached over HTTP, and what cannot."""

import fastapi
import pytest

pytest.importorskip("gradio")

from fastapi import testclient  # noqa: E402

from sana_jax.app import limits, page, service  # noqa: E402
from tests import tiny  # noqa: E402

pytestmark = pytest.mark.ui


@pytest.fixture(scope="module")
def client(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(directory)
  served = service.Service(tiny.make_pipeline(directory))
  app = fastapi.FastAPI()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("GRADIO_TEMP_DIR", "")  # which mounting sets
    page.mount(app, served)
    with testclient.TestClient(app) as client:
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


@pytest.mark.parametrize("path", ["upload", "queue/join"])
def test_other_sites_cannot_send_anything(client, path):
  answer = client.post(
    f"/gradio_api/{path}", json={}, headers={"sec-fetch-site": "cross-site"}
  )
  assert answer.status_code == 403
