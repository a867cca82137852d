"""What is wrong with the command's flags is said before a model is loaded."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

pytest.importorskip("gradio")

from sana_jax.app import server  # noqa: E402

pytestmark = pytest.mark.ui

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def taken():
  """A port that somebody listens at."""
  with socket.create_server(("127.0.0.1", 0)) as listening:
    yield listening.getsockname()[1]


@pytest.mark.parametrize(
  ("flags", "told"),
  [
    (["--port={taken}"], "sana_jax.app: Cannot listen at 127.0.0.1, port"),
    (["--port=99999"], "--port=99999: 99999 is not an integer in the range"),
    (["--grace_seconds=-1"], "-1.0 is not a non-negative"),
    (["--lora=none=x", "--port=0"], "--lora=none=x: expected NAME=PATH"),
  ],
)
def test_a_wrong_flag_is_one_line(taken, flags, told):
  flags = [flag.format(taken=taken) for flag in flags]
  done = subprocess.run(
    [sys.executable, "-m", "sana_jax.app", "--checkpoint=nowhere", *flags],
    cwd=_ROOT,
    env=os.environ | {"PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 1
  assert told in done.stderr
  assert "nowhere" not in done.stderr
  assert "Traceback" not in done.stderr


def test_a_port_that_can_be_had_is_not_taken_by_looking(taken):
  for port in (0, taken):
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
      if port == 0:
        server.check_port(host, port)
      else:
        with pytest.raises(OSError, match="choose another --port"):
          server.check_port(host, port)
  with pytest.raises(OSError, match="Cannot listen at nowhere.invalid"):
    server.check_port("nowhere.invalid", 0)
