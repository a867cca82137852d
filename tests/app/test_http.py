"""The endpoint over real sockets: OpenAI's client, and those who mean ill."""

import base64
import concurrent.futures
import contextlib
import io
import json
import socket
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("gradio")

import httpx  # noqa: E402  comes with openai

from sana_jax.app import bodies, hosts, making, openai_api, server  # noqa: E402
from sana_jax.app import service as service_lib  # noqa: E402
from sana_jax.app.jobs import Update  # noqa: E402
from sana_jax.app.limits import Limits  # noqa: E402
from tests import tiny  # noqa: E402
from tests.app import hostile  # noqa: E402

pytestmark = pytest.mark.ui

PATH = "/v1/images/generations"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(path)
  return tiny.make_pipeline(path, devices=jax.devices()[:1])


@contextlib.contextmanager
def serving(pipe, limits=Limits(), **options):  # noqa: B008  frozen
  """Yields (service, address) of a server in a thread."""
  service = service_lib.Service(pipe, limits)
  app = server.make_app(service, with_page=False, **options)
  with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    http = server.Server(app, service, grace_seconds=0)
    thread = threading.Thread(target=http.run, args=([listening],))
    thread.start()
    while not http.started:
      time.sleep(0.01)
    try:
      yield service, listening.getsockname()
    finally:
      http.should_exit = True
      service.close()
      thread.join(30)


@pytest.fixture(scope="module")
def steered(tmp_path_factory):
  """Serves a pipeline with a ControlNet."""
  path = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(path)
  pipe = tiny.make_pipeline(path, controlnet=True, devices=jax.devices()[:1])
  with serving(pipe, Limits(max_upload_bytes=300_000)) as running:
    yield running


@pytest.fixture(scope="module")
def served(pipe):
  with serving(pipe) as running:
    yield running


@pytest.fixture
def client(served):
  return client_of(served[1])


def client_of(address, **options):
  host, port = address
  url = f"http://{host}:{port}/v1"
  options = {"api_key": "none", "max_retries": 0} | options
  return openai.OpenAI(base_url=url, **options)


def url_of(address, path=PATH):
  return f"http://{address[0]}:{address[1]}{path}"


def post(address, content: bytes, **headers):
  headers = {"content-type": "application/json"} | headers
  return httpx.post(
    url_of(address), content=content, headers=headers, timeout=300
  )


@pytest.fixture
def gate(monkeypatch):
  """Makes jobs called "gate" wait until it is let go."""
  gate = threading.Event()
  make = making.Maker.make

  def wait(self, request, post):
    if request.prompt != "gate":
      return make(self, request, post)
    while not gate.wait(0.005):
      post(Update("encode"))
    return making.Result([], [b"png"], request.seed, request.settings())

  monkeypatch.setattr(making.Maker, "make", wait)
  yield gate
  gate.set()


def encoded(picture: np.ndarray) -> str:
  buffer = io.BytesIO()
  PIL.Image.fromarray(picture).save(buffer, "PNG")
  return base64.b64encode(buffer.getvalue()).decode()


def wait_until(condition):
  for _ in range(1000):
    if condition():
      return
    time.sleep(0.01)
  raise AssertionError("it never came true")


def test_openais_client_gets_images_that_say_how_they_were_made(client, caplog):
  caplog.set_level("INFO", "absl")
  answer = client.images.generate(
    prompt="a red apple",
    n=2,
    size="32x32",
    user="somebody",
    response_format="b64_json",
    quality="standard",
    style="vivid",
    background="auto",
    moderation="auto",
    output_compression=100,
    stream=False,
    extra_body={"seed": 5, "guidance_scale": 3, "num_inference_steps": 2},
  )
  assert "2 images for 127.0.0.1, user 'somebody'" in caplog.text
  assert answer.seed == 5
  assert answer.warnings == []
  assert abs(answer.created - time.time()) < 3600
  images = [
    PIL.Image.open(io.BytesIO(base64.b64decode(data.b64_json)))
    for data in answer.data
  ]
  assert [image.size for image in images] == [(32, 32)] * 2
  assert np.asarray(images[0]).std() > 1
  assert np.any(np.asarray(images[0]) != np.asarray(images[1]))
  for i, image in enumerate(images):
    description = json.loads(image.info["sana_jax"])
    assert description["prompt"] == "a red apple"
    assert (description["seed"], description["image_index"]) == (5, i)
    assert description["num_inference_steps"] == 2
  (model,) = client.models.list()
  again = client.images.generate(
    prompt="a red apple",
    model=model.id,
    size="auto",
    extra_body={
      "seed": 5,
      "image_index": 1,
      "guidance_scale": 3.0,
      "num_inference_steps": 2,
      "negative_prompt": None,
    },
  )
  image = PIL.Image.open(io.BytesIO(base64.b64decode(again.data[0].b64_json)))
  np.testing.assert_allclose(
    np.asarray(image, np.int16), np.asarray(images[1], np.int16), atol=2
  )


def test_what_is_worth_knowing_of_the_images_comes_with_them(client):
  answer = client.images.generate(
    prompt="a cat " * 100, size="64x32", extra_body={"guidance_scale": 12}
  )
  assert len(answer.data) == 1
  settings, prompt = answer.warnings
  assert settings == (
    "Outside the trained range: guidance_scale 12 (more than 10 burns colours)."
  )
  assert prompt.startswith("A prompt is too long: ")


@pytest.mark.parametrize(
  ("fields", "param", "hint"),
  [
    ({"n": 10**6}, "n", "n must be from 1 to 4"),
    ({"n": -1}, "n", "from 1"),
    ({"n": "2"}, "n", "whole"),
    ({"n": True}, "n", "n must be a whole number, got true."),
    ({"n": 1.5}, "n", "n must be a whole number, got 1.5."),
    ({"n": 2e300}, "n", "n must be from 1 to 4, got a number of more than"),
    ({"seed": [None, False]}, "seed", "got [null, false]."),
    ({"prompt": {"a": True}}, "prompt", 'must be a text, got {"a": true}.'),
    ({"prompt": ""}, "prompt", "empty"),
    ({"prompt": "a\x00"}, "prompt", "U+0000"),
    ({"prompt": "a" * 3000}, "prompt", "2000"),
    ({"prompt": ["a"]}, "prompt", "text"),
    ({"size": "33x32"}, "size", "size: the width 33 must be a positive"),
    ({"size": "32x33"}, "size", "size: the height 33 must be a positive"),
    ({"size": "1024x1024"}, "size", "An image of width 1024 and height 1024"),
    ({"size": "128x16"}, "size", "Of an image's width, here 128, and height"),
    ({"size": "-32x32"}, "size", "1024x1024"),
    ({"size": "99999x99999"}, "size", "size: the height must be from 1"),
    ({"size": [32, 32]}, "size", "1024x1024"),
    ({"response_format": "url"}, "response_format", "no url"),
    ({"output_format": "webp"}, "output_format", "png"),
    ({"user": "a" * 300}, "user", "256"),
    ({"quality": "hd"}, "quality", 'values here than "auto" or "standard"'),
    ({"stream": 0}, "stream", "no other values here than false; leave"),
    ({"partial_images": False}, "partial_images", "no other values here than"),
    ({"stream": True}, "stream", "no other values here than false; leave"),
    ({"background": ["auto"]}, "background", "no other values"),
    ({"colour": "red"}, "colour", "Unknown field"),
    ({"__class__": {}}, "__class__", "Unknown field"),
    ({"image": "/etc/passwd"}, "image", "Unknown field"),
    ({"control_image": "AA=="}, "control_image", "there is no ControlNet"),
    (
      {"control_image": encoded(np.zeros((4, 4), np.uint8))},
      *("control_image", "there is no ControlNet here; leave it out"),
    ),
    ({"lora": "../../etc/passwd"}, "lora", "no adapters here; leave lora out"),
    ({"seed": -1}, "seed", "from 0"),
    ({"guidance_scale": -1}, "guidance_scale", "from 0"),
    ({"guidance_scale": {}}, "guidance_scale", "number"),
    ({"num_inference_steps": 10**9}, "num_inference_steps", "100"),
    ({"aspect": "1:1", "size": "32x32"}, "aspect", "cannot go with size"),
  ],
)
@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_an_error_of_openais_client(client, fields, param, hint):
  with pytest.raises(openai.BadRequestError) as caught:
    client.post(
      "/images/generations",
      cast_to=object,
      body={"prompt": "a cat"} | fields,
    )
  error = caught.value
  assert (error.status_code, error.param) == (400, param)
  assert error.type == "invalid_request_error"
  assert error.code == "invalid_value"
  assert hint in error.message


def test_a_controlnet_follows_the_picture_it_is_sent(steered, rng):
  def pixels(picture, scale):
    answer = client_of(steered[1]).images.generate(
      prompt="a cat",
      extra_body={
        "seed": 3,
        "control_image": encoded(picture),
        "controlnet_conditioning_scale": scale,
      },
    )
    image = PIL.Image.open(
      io.BytesIO(base64.b64decode(answer.data[0].b64_json))
    )
    described = json.loads(image.info["sana_jax"])
    assert described["control_image"] == "uploaded"
    assert described["controlnet_conditioning_scale"] == scale
    return np.asarray(image, np.int16)

  # More than a body without a picture may have.
  large = rng.integers(0, 255, (310, 310, 3), np.uint8)
  small = np.zeros((32, 32, 3), np.uint8)
  assert len(encoded(large)) > bodies.MAX_BODY_BYTES
  first, second = pixels(large, 1.0), pixels(small, 1.0)
  assert np.abs(first - second).max() > 2
  without = pixels(large, 0.0)
  assert np.abs(first - without).max() > 2
  np.testing.assert_array_equal(pixels(small, 0.0), without)


@pytest.mark.parametrize(
  ("value", "hint"),
  [
    (None, "control_image is missing: images are made with a ControlNet"),
    ("/etc/passwd", "base64"),
    (["a"], "base64"),
    ("\u00e4", "base64"),
    (base64.b64encode(b"no picture").decode(), "not a readable picture"),
    (base64.b64encode(bytes(300_001)).decode(), "at most 300000"),
    (base64.b64encode(hostile.bomb()).decode(), "too many pixels"),
    (
      base64.b64encode(hostile.png(5000, 5000, b"")).decode(),
      "5000x5000 pixels; at most 16777216 are allowed",
    ),
  ],
)
def test_what_is_no_picture_for_a_controlnet_is_said(steered, value, hint):
  body = {"prompt": "a cat", "control_image": value}
  answer = post(steered[1], json.dumps(body).encode())
  assert answer.status_code == 400
  error = answer.json()["error"]
  assert hint in error["message"]
  assert "pipeline" not in error["message"]
  assert error["param"] == "control_image"


def test_few_large_bodies_are_in_memory_at_a_time(steered):
  size = bodies.MAX_BODY_BYTES + 1
  large = json.dumps({"prompt": "a" * size}).encode()
  said = f"Content-Length: {len(large)}"
  with contextlib.ExitStack() as stack:
    stalled = [
      stack.enter_context(send_head(steered[1], JSON, said))
      for _ in range(openai_api._LARGE_BODIES)
    ]
    for connection in stalled:
      connection.sendall(large[:1000])
    time.sleep(0.2)
    waiting = stack.enter_context(send_head(steered[1], JSON, said))
    waiting.sendall(large)
    waiting.settimeout(0.5)
    with pytest.raises(TimeoutError):
      waiting.recv(100)
    assert post(steered[1], b'{"prompt": "a"}').status_code == 400
    stalled[0].close()
    waiting.settimeout(30)
    assert b" 400 " in waiting.recv(100)


def test_a_body_for_a_controlnet_is_bounded_too(steered):
  with send_head(steered[1], JSON, "Content-Length: 700000") as connection:
    assert b" 413 " in connection.recv(100)


def test_a_whole_number_may_have_a_point(client):
  whole = {"n": 2, "seed": 7, "image_index": 3, "num_inference_steps": 2}
  first, second = (
    client.post(
      "/images/generations",
      cast_to=object,
      body={"prompt": "a cat", "output_compression": kind(100)}
      | {name: kind(value) for name, value in whole.items()},
    )
    for kind in (int, float)
  )
  assert second["seed"] == 7
  assert len(second["data"]) == 2
  assert first["data"] == second["data"]


def test_another_model_is_not_found(client):
  with pytest.raises(openai.NotFoundError) as caught:
    client.images.generate(prompt="a", model="dall-e-3")
  assert caught.value.param == "model"
  assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
  ("body", "hint"),
  [
    (b"", "JSON"),
    (b'{"prompt": "a"', "JSON"),
    (b'{"prompt": "a", "guidance_scale": NaN}', "NaN is no JSON number"),
    (b'{"prompt": "a", "guidance_scale": -Infinity}', "-Infinity"),
    (b'{"prompt": "a", "guidance_scale": 1e999}', "inf"),
    (b'{"prompt": "a", "n": 1' + b"0" * 4000 + b"}", "20 digits"),
    (
      b'{"prompt": "a", "n": 1' + b"0" * 9000 + b"}",
      "a number has 9001 digits.",
    ),
    (b'{"prompt": "\\ud800"}', "U+D800"),
    (b'{"prompt": "\xff"}', "JSON"),
    (b"[" * 200_000, "deeply"),
    (b'{"prompt":' * 20_000, "deeply"),
    (b'["prompt"]', "object"),
    (b"null", "object"),
    (b"{}", "no prompt"),
  ],
  ids=range(14),
)
def test_no_body_breaks_the_server(served, body, hint):
  answer = post(served[1], body)
  assert answer.status_code == 400
  error = answer.json()["error"]
  assert hint in error["message"]
  assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
  "kind", ["text/plain", "multipart/form-data", "", "application/xml"]
)
def test_other_content_types_and_origins_get_nothing(served, kind):
  # What a foreign page can have a browser send without asking.
  headers = {"content-type": kind, "origin": "http://evil.example"}
  answer = post(served[1], b'{"prompt": "a"}', **headers)
  assert answer.status_code == 415
  assert "access-control-allow-origin" not in answer.headers


def send_head(address, *lines):
  connection = socket.create_connection(address, timeout=30)
  head = "\r\n".join([f"POST {PATH} HTTP/1.1", "Host: x", *lines, "", ""])
  connection.sendall(head.encode())
  return connection


JSON = "Content-Type: application/json"


def test_100_megabytes_are_refused_before_they_are_sent(served):
  with send_head(served[1], JSON, "Content-Length: 100000000") as connection:
    assert b" 413 " in connection.recv(100)


def test_a_body_of_unknown_length_is_read_up_to_the_limit(served):
  sent = 0
  with send_head(served[1], JSON, "Transfer-Encoding: chunked") as connection:
    answer = b""
    connection.settimeout(0.02)
    while not answer and sent < 100_000_000:
      with contextlib.suppress(TimeoutError, ConnectionError):
        connection.sendall(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        sent += 0x10000
      with contextlib.suppress(TimeoutError):
        answer = connection.recv(100)
  assert b" 413 " in answer
  assert sent < 20_000_000  # what buffers of the system hold


def test_slow_clients_are_hung_up_on_and_hold_up_nobody(
  served, client, monkeypatch
):
  monkeypatch.setattr(server, "_HEAD_SECONDS", 0.5)
  monkeypatch.setattr(bodies, "_READ_SECONDS", 0.5)
  slow = [socket.create_connection(served[1], timeout=30) for _ in range(20)]
  for connection in slow:
    connection.sendall(b"POST /v1/ima")
  with send_head(served[1], JSON, "Content-Length: 100") as connection:
    connection.sendall(b'{"prompt')
    assert client.images.generate(prompt="a cat").data
    assert b" 408 " in connection.recv(100)
  for connection in slow:
    assert connection.recv(100) == b""
    connection.close()


def test_a_client_that_leaves_has_its_job_cancelled(served, client, gate):
  service, address = served
  body = b'{"prompt": "gate"}'
  connections = []
  for _ in range(3):  # one that is made, two that wait
    connection = send_head(address, JSON, f"Content-Length: {len(body)}")
    connection.sendall(body)
    connections.append(connection)
  wait_until(lambda: service.num_waiting == 2)
  connections[1].close()
  wait_until(lambda: service.num_waiting == 1)
  connections[0].close()
  wait_until(lambda: service.num_waiting == 0)
  connections[2].close()
  assert client.images.generate(prompt="a cat").data  # nobody is in the way


def test_a_full_queue_says_when_to_come_again(pipe, gate):
  limits = Limits(max_waiting=1)
  with (
    serving(pipe, limits) as (service, address),
    concurrent.futures.ThreadPoolExecutor(2) as pool,
  ):
    answers = []
    for waiting in range(2):
      answers.append(pool.submit(post, address, b'{"prompt": "gate"}'))
      wait_until(lambda: service._running is not None)
      wait_until(lambda: service.num_waiting == waiting)  # noqa: B023
    with pytest.raises(openai.RateLimitError) as caught:
      client_of(address).images.generate(prompt="a cat")
    assert int(caught.value.response.headers["retry-after"]) >= 1
    assert caught.value.code == "rate_limit_exceeded"
    gate.set()
    assert [a.result(30).status_code for a in answers] == [200, 200]
    # OpenAI's client waits and tries again by itself.
    patient = client_of(address, max_retries=5)
    assert patient.images.generate(prompt="a cat").data


def test_who_waits_while_the_service_closes_is_told(pipe, gate):
  with (
    serving(pipe) as (service, address),
    concurrent.futures.ThreadPoolExecutor(3) as pool,
  ):
    answers = [
      pool.submit(post, address, b'{"prompt": "gate"}') for _ in range(3)
    ]
    wait_until(lambda: service.num_waiting == 2)
    assert service.close()
    for answer in answers:
      assert answer.result(30).status_code == 503
      assert "shutting down" in answer.result().json()["error"]["message"]
    late = post(address, b'{"prompt": "late"}')
    assert late.status_code == 503
    health = httpx.get(url_of(address, "/health"))
    assert health.status_code == 503
    assert health.json() == {"status": "closing", "waiting": 0}


def test_a_key_is_asked_for_if_there_is_one(pipe):
  with serving(pipe, api_key="sesame") as (_, address):
    for key in (b"wrong", b"sesame2", b"s\xe9same", b"Bearer sesame"):
      given = {"authorization": b"Bearer " + key}
      answer = post(address, b'{"prompt": "a"}', **given)
      assert answer.status_code == 401
      assert answer.json()["error"]["code"] == "invalid_api_key"
    assert httpx.get(url_of(address, "/v1/models")).status_code == 401
    assert list(client_of(address, api_key="sesame").models.list())
    assert httpx.get(url_of(address, "/health")).status_code == 200


def test_a_server_of_this_machine_is_not_called_by_other_names(pipe):
  names = [*hosts.LOOPBACK, "images.example.org", "2001:db8:0:0::1"]
  with serving(pipe, host_names=names) as (_, address):
    health = url_of(address, "/health")
    for host, status in (
      *(("localhost", 200), ("localhost:80", 200), ("[::1]:7860", 200)),
      *(("127.0.0.1", 200), ("Images.Example.org", 200)),
      *(("evil.example", 421), ("evil.example:7860", 421), ("127.0.0.2", 421)),
      *(("localhost.evil.example", 421), ("a{b.evil.example", 421)),
      *(("[", 421), ("localhost`.evil.example", 421), ("", 421)),
      *(("[2001:DB8::1]", 200), ("[0:0::1]:80", 200), ("[::2]", 421)),
      *(("evil.example:99999", 421), ("localhost:x", 421), ("10.0.0.1", 421)),
    ):
      answer = httpx.get(health, headers={"host": host})
      assert answer.status_code == status, host
    assert "--allowed_host=10.0.0.1" in answer.text
    assert "access-control-allow-origin" not in answer.headers
    answer = post(address, b'{"prompt": "a"}', host="evil.example")
    assert answer.status_code == 421
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "--allowed_host=evil.example" in error["message"]
    answer = httpx.get(url_of(address, "/v1"), headers={"host": "evil.example"})
    assert answer.json()["error"] == error


def test_a_port_that_another_has_taken_meanwhile_ends_the_server(pipe, caplog):
  sockets = server.bind("127.0.0.1", 0)
  service = service_lib.Service(pipe)
  http = server.Server(
    server.make_app(service, with_page=False), service, grace_seconds=0
  )
  with socket.create_server(sockets[0].getsockname()):
    http.run(sockets)
  service.close()
  sockets[0].close()
  assert not http.started
  assert "cannot listen: Address already in use" in caplog.text


@pytest.mark.parametrize(
  ("method", "path"),
  [
    ("GET", PATH),
    ("POST", "/v1/images/edits"),
    ("GET", "/v1/../../etc/passwd"),
    ("GET", "/v1/models/..%2f..%2fetc%2fpasswd"),
    ("DELETE", "/v1/models"),
    ("GET", "/v1"),
  ],
)
def test_what_is_not_there_is_said_in_the_apis_shape(served, method, path):
  answer = httpx.request(method, url_of(served[1], path))
  assert answer.status_code == 404
  assert "root:" not in answer.text
  if "v1" in str(answer.url):
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_failing_job_tells_nothing_of_the_inside(served, monkeypatch):
  def fail(*args):
    raise RuntimeError("/home/secret")

  monkeypatch.setattr(making.Maker, "make", fail)
  answer = post(served[1], b'{"prompt": "a"}')
  assert answer.status_code == 500
  assert answer.json()["error"]["type"] == "server_error"
  assert "secret" not in answer.text
