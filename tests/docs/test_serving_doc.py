"""The examples of docs/serving.md, against the server that it says to start."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("gradio")
pytest.importorskip("openai")

from tests.docs import reading, running  # noqa: E402

pytestmark = pytest.mark.docs

_PAGE = reading.ROOT / "docs/serving.md"
_ADDRESS = "http://127.0.0.1:7860"
_BLOCKS = reading.blocks(_PAGE)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
  return running.make_workspace(tmp_path_factory.mktemp("serving"))


@pytest.fixture(scope="module")
def address(root):
  """Starts the server as the page says, but at a free port."""
  command = next(reading.commands(_PAGE))
  assert command.program == "sana_jax.app"
  argv = [running.SUBSTITUTES.get(word, word) for word in command.argv]
  log = root / "log"
  with log.open("w") as file:
    process = subprocess.Popen(
      [
        *(sys.executable, "-m", command.program, *argv),
        *("--port=0", "--nowarm_up"),
      ],
      cwd=root,
      env=running.environment(root),
      stderr=file,
    )
  try:
    while not (found := re.search(r"listening at (\S+)", log.read_text())):
      assert process.poll() is None, log.read_text()
      time.sleep(0.1)
    yield found[1]
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0, log.read_text()
  finally:
    process.kill()
    process.wait()


def python(root, source: str) -> None:
  done = subprocess.run(
    [sys.executable, "-c", source],
    cwd=root,
    env=running.environment(root),
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-4000:]


def example(language: str, word: str) -> str:
  """Returns the one block that has a word."""
  (found,) = (
    b.text for b in _BLOCKS if b.language == language and word in b[1]
  )
  return found


def test_every_example_is_one_of_these():
  languages = [block.language for block in _BLOCKS]
  assert languages.count("python") == 2
  assert sum("curl " in block.text for block in _BLOCKS) == 1


def test_openais_client_gets_an_image(root, address):
  source = example("python", "openai").replace(_ADDRESS, address)
  assert address in source
  source += 'open("client.png", "wb").write(png); assert len(answer.data) == 2'
  python(root, source)
  assert (root / "client.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_curl_gets_an_image(root, address):
  command = example("sh", "curl ").replace(_ADDRESS, address)
  done = subprocess.run(
    ["sh", "-c", command], capture_output=True, check=True, text=True
  )
  answer = json.loads(done.stdout)
  assert len(answer["data"]) == 1
  assert answer["seed"] == 7


def test_a_service_without_a_server_makes_an_image(root):
  python(root, example("python", "Service"))
  assert (root / "heart.png").read_bytes().startswith(b"\x89PNG")
