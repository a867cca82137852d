"""What is wrong with the command's flags is said before a model is loaded."""

import gc
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import warnings

import pytest

pytest.importorskip("gradio")

from sana_jax.app import hosts, server, service  # noqa: E402

pytestmark = pytest.mark.ui

_ROOT = pathlib.Path(__file__).parents[2]


# Importing takes most of the time: one process does, and forks.
_RUN = """
import json, os, sys
from absl import app
from sana_jax.app import __main__ as command
for number, flags in enumerate(json.load(sys.stdin)):
  if (child := os.fork()) == 0:
    os.dup2(os.open(f"{number}", os.O_CREAT | os.O_WRONLY), 2)
    app.run(command.main, ["sana_jax.app", "--checkpoint=nowhere", *flags])
  status = os.waitpid(child, 0)[1]
  print(os.waitstatus_to_exitcode(status), flush=True)
"""

# The signal comes where Python swallows what a handler raises. The last child
# has a service that nothing but the end of the process ends.
_RUN_AND_END = """
import gc, os, signal, sys, threading, types
from absl import app
from sana_jax.app import __main__ as command
def run():
  if (child := os.fork()) == 0:
    signal.alarm(60)
    app.run(command.main, ["sana_jax.app", "--port=0", "--nopage"])
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
def load():
  gc.callbacks.append(lambda phase, _: os.kill(os.getpid(), number))
  gc.collect()
  sys.stderr.write("went on")
command.make_service = load
for number in (signal.SIGINT, signal.SIGTERM):
  run()
class Hanging:
  model_name, pipe = "none", types.SimpleNamespace(controlnet=None)
  def __init__(self):
    threading.Thread(target=threading.Event().wait).start()
  def close(self, *_):
    sys.stderr.write("asked to close\\n")
    return False
class Server(command.server_lib.Server):
  async def startup(self, sockets=None):
    await super().startup(sockets)
    os.kill(os.getpid(), signal.SIGTERM)
command.make_service, command.server_lib.Server = Hanging, Server
run()
"""


@pytest.fixture
def taken():
  """A port that somebody listens at."""
  with socket.create_server(("127.0.0.1", 0)) as listening:
    yield listening.getsockname()[1]


def test_what_is_wrong_with_a_flag_is_one_line(taken, tmp_path):
  expected = {
    f"--port={taken}": "sana_jax.app: Cannot listen at 127.0.0.1, port",
    "--port=99999": "--port=99999: 99999 is not an integer in the range",
    "--grace_seconds=-1": "=-1.0: Expected seconds, from 0 to 86400.",
    "--grace_seconds=nan": "=nan: Expected seconds, from 0 to 86400.",
    "--grace_seconds=inf": "=inf: Expected seconds, from 0 to 86400.",
    "--allowed_host=a.example:80": "--allowed_host=a.example:80: expected",
    "--lora=none=x": "--lora=none=x: expected NAME=PATH",
    "--max_steps=0": ": --max_steps must be a whole number from 1 to 21474836",
    "--max_images=9999999999": ": --max_images must be a whole number from 1",
    "--max_pixels=1e6": "--max_pixels=1e6: invalid literal for int()",
  }
  done = subprocess.run(
    [sys.executable, "-c", _RUN],
    input=json.dumps([["--port=0", flag] for flag in expected]),
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.split() == ["1"] * len(expected), done.stderr
  for number, (flag, told) in enumerate(expected.items()):
    said = (tmp_path / f"{number}").read_text()
    assert told in said, flag
    assert "nowhere" not in said
    assert "Traceback" not in said


def test_a_signal_while_loading_and_what_hangs_at_the_end_end_at_once():
  done = subprocess.run(
    [sys.executable, "-c", _RUN_AND_END],
    env=os.environ | {"PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.stdout.split() == ["130", "143", "0"], done.stderr
  assert [line for line in done.stderr.splitlines() if " ended " in line] == [
    "sana_jax.app: ended by SIGINT",
    "sana_jax.app: ended by SIGTERM",
  ]
  assert done.stderr.count("asked to close") == 1
  assert "Traceback" not in done.stderr
  assert "went on" not in done.stderr


def test_the_longest_end_is_the_one_that_is_documented():
  code = (_ROOT / "sana_jax/app/__main__.py").read_text(encoding="utf-8")
  (grace,) = re.findall(r'"grace_seconds", ([0-9.]+)', code)
  longest = float(grace) + service._STOP_SECONDS + server._LAST_SECONDS
  text = (_ROOT / "docs/serving.md").read_text(encoding="utf-8")
  assert f": {longest:.0f} seconds by default." in " ".join(text.split())


def test_a_port_is_taken_or_the_reason_is_said(taken):
  for host in ("127.0.0.1", "localhost", "0.0.0.0"):
    sockets = server.bind(host, 0)
    assert all(one.getsockname()[1] for one in sockets)
    for one in sockets:
      one.close()
    with pytest.raises(OSError, match="in use. End .* choose another --port"):
      server.bind(host, taken)
  # The second is for documentation: no machine has it.
  for host in ("nowhere.invalid", "192.0.2.1"):
    told = f"^Cannot listen at {host}, port 0: .*[.] Choose an address of this"
    with pytest.raises(OSError, match=told):
      server.bind(host, 0)


def test_of_the_addresses_of_a_name_this_machines_are_taken(monkeypatch):
  kind = (socket.AF_INET, socket.SOCK_STREAM, 0, "")
  own, other = (*kind, ("127.0.0.1", 0)), (*kind, ("192.0.2.1", 0))
  monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [other, own, own])
  with warnings.catch_warnings(record=True) as told:
    gc.collect()  # what is not of this test
    warnings.simplefilter("always", ResourceWarning)
    (one,) = server.bind("a.example", 0)
    gc.collect()
  assert not [w for w in told if "unclosed" in str(w.message)]
  assert one.getsockname()[0] == "127.0.0.1"
  one.close()


@pytest.mark.parametrize(
  "name", ["a.example", "UPPER", "10.0.0.1", "::1", "2001:db8:0:0::1"]
)
def test_a_name_or_an_address_is_a_host(name):
  hosts.check_name(name)


@pytest.mark.parametrize(
  "name", ["", "a:80", "[::1]", "[::1]:80", "http://a", "a/b", "*.a", "\xe4"]
)
def test_what_no_request_could_name_is_no_host(name):
  with pytest.raises(ValueError, match="expected a name or an address alone"):
    hosts.check_name(name)
