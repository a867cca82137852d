"""A server process under load, and told to stop with requests waiting."""

import base64
import concurrent.futures
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("gradio")

import httpx  # noqa: E402  comes with openai

pytestmark = pytest.mark.ui

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def server(tmp_path):
  """Starts a server with the bundled model; yields (process, address, log)."""
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  log = tmp_path / "log"
  temporary = tmp_path / "temporary"
  temporary.mkdir()
  environment |= {"PYTHONPATH": str(_ROOT), "TMPDIR": str(temporary)}
  with log.open("w") as file:
    process = subprocess.Popen(
      [
        *(sys.executable, "-m", "sana_jax.app", "--port=0", "--nowarm_up"),
        *("--max_waiting_per_client=32", "--grace_seconds=2"),
      ],
      cwd=_ROOT,
      env=environment,
      stderr=file,
    )
  try:
    for _ in range(600):
      assert process.poll() is None, log.read_text()
      if found := re.search(r"listening at (http://\S+)", log.read_text()):
        break
      time.sleep(0.2)
    yield process, found[1], log
  finally:
    process.kill()
    process.wait()


def wait_for(text: str, log: pathlib.Path, seconds: float = 60) -> None:
  deadline = time.monotonic() + seconds
  while text not in log.read_text():
    assert time.monotonic() < deadline, log.read_text()
    time.sleep(0.05)


def megabytes(process) -> float:
  status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
  return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def generate(address, number: int, retries: int = 10):
  """Returns the pixels and the seed of an answer."""
  client = openai.OpenAI(
    base_url=f"{address}/v1", api_key="none", max_retries=retries
  )
  answer = client.images.generate(
    prompt=f"cat number {number}",
    extra_body={"seed": number, "num_inference_steps": 2},
    timeout=300,
  )
  data = base64.b64decode(answer.data[0].b64_json)
  return np.asarray(PIL.Image.open(io.BytesIO(data))), answer.seed


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_50_requests_of_8_clients_and_an_end_with_some_waiting(server):
  process, address, log = server
  with concurrent.futures.ThreadPoolExecutor(8) as clients:
    # Once around, so that everything is compiled and every thread is there.
    warm = clients.map(lambda number: generate(address, number), range(16))
    assert len(list(warm)) == 16
    before = megabytes(process)
    answers = list(
      clients.map(lambda number: generate(address, number), range(50))
    )
  after = megabytes(process)
  assert [seed for _, seed in answers] == list(range(50))
  assert all(pixels.shape == (64, 64, 3) for pixels, _ in answers)
  assert len({pixels.tobytes() for pixels, _ in answers}) == 50
  sys.stdout.write(f"{before:.0f} MB before, {after:.0f} MB after\n")
  assert after - before < 50

  def ask(number):
    try:
      return generate(address, number, retries=0)[0].shape
    except openai.InternalServerError as error:
      return error.status_code, error.code

  with concurrent.futures.ThreadPoolExecutor(20) as clients:
    waiting = [clients.submit(ask, number) for number in range(20)]
    while httpx.get(f"{address}/health", timeout=60).json()["waiting"] < 5:
      if all(answer.done() for answer in waiting):
        raise AssertionError("nobody waited: make the requests slower")
    process.send_signal(signal.SIGTERM)
    outcomes = [answer.result(300) for answer in waiting]
  assert set(outcomes) <= {(64, 64, 3), (503, "shutting_down")}
  assert process.wait(120) == 0
  text = log.read_text()
  assert "SIGTERM: ending" in text
  assert "Traceback" not in text


def test_an_open_page_does_not_hold_up_the_end(server):
  process, address, log = server
  # What a page keeps open as long as it is there.
  stream = f"{address}/gradio_api/heartbeat/abc"
  with httpx.stream("GET", stream, timeout=60) as heartbeat:
    lines = heartbeat.iter_lines()
    assert "ALIVE" in next(lines)
    process.send_signal(signal.SIGINT)
    assert not [line for line in lines if line and "ALIVE" not in line]
  assert process.wait(120) == 0
  text = log.read_text()
  assert "SIGINT: ending" in text
  for trouble in ("Traceback", "ERROR", "Exception"):
    assert trouble not in text


def test_a_second_signal_ends_at_once_and_leaves_no_pictures(server, tmp_path):
  process, address, log = server
  (files,) = tmp_path.glob("temporary/sana_jax_page_*")
  (files / "visit").mkdir()
  (files / "visit/cat.png").write_bytes(b"a picture")
  with concurrent.futures.ThreadPoolExecutor(1) as clients:
    # Its program is compiled first, which nothing interrupts.
    waiting = clients.submit(generate, address, 0, 0)
    wait_for("1 image", log)
    process.send_signal(signal.SIGTERM)
    wait_for("SIGTERM: ending", log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 128 + signal.SIGTERM
    assert isinstance(waiting.exception(), openai.APIConnectionError)
  last = log.read_text().splitlines()[-1]
  assert last == "sana_jax.app: ended by SIGTERM"
  assert not list(tmp_path.glob("temporary/sana_jax_page_*"))
