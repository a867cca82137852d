"""Profiles of the steps that were asked for, and of no others."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from sana_jax.training import loop, profiling
from tests.training import test_loop

ROOT = pathlib.Path(__file__).parents[2]


def traces(path):
  return sorted((path / "profile").rglob("*.xplane.pb"))


def test_a_window_of_steps_is_profiled(tmp_path, caplog):
  options = loop.Options(profile_steps=(3, 4))
  with caplog.at_level("INFO", logger="absl"):
    loop.train(
      test_loop.make_config(), tmp_path, test_loop.make_recipe(), options
    )
  assert "profiling steps 3 to 4" in caplog.text
  (trace,) = traces(tmp_path)
  content = trace.read_bytes()
  assert b"train" in content


def test_a_signal_asks_for_the_next_steps(tmp_path, caplog):
  recipe = test_loop.make_recipe()

  def batches(host, first_step):
    for step, batch in enumerate(recipe.batches(host, first_step)):
      if step == 4:
        os.kill(os.getpid(), signal.SIGUSR1)
      yield batch

  before = signal.getsignal(signal.SIGUSR1)
  with caplog.at_level("INFO", logger="absl"):
    loop.train(
      test_loop.make_config(), tmp_path, recipe._replace(batches=batches)
    )
  assert len(traces(tmp_path)) == 1
  (line,) = [x for x in caplog.messages if x.startswith("profiling steps")]
  first, last = (int(word) for word in line.split() if word.isdigit())
  # The feed is up to two batches ahead.
  assert 2 <= first <= 6
  assert last == first + 2
  assert signal.getsignal(signal.SIGUSR1) == before


def test_a_signal_before_the_first_step_is_ignored(tmp_path):
  """As early as the config is read; that has no fields is what ends train."""
  config = tmp_path / "signals.py"
  config.write_text(
    "import os, signal\n"
    "def get_config():\n"
    "  os.kill(os.getpid(), signal.SIGUSR1)\n"
    "  return 'no config'\n"
  )
  done = subprocess.run(
    [
      *(sys.executable, "train.py", f"--config={config}"),
      f"--workdir={tmp_path}",
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 1, done.stderr
  assert "get_config() of --config must return one of" in done.stderr


@pytest.mark.parametrize("text", ["", "3", "0:2", "5:4", "a:b", "1:2:3"])
def test_a_window_that_cannot_be_is_refused(text):
  with pytest.raises(ValueError, match=r"--profile_steps must be FIRST:LAST"):
    profiling.parse_steps(text)


def test_a_window_is_read():
  assert profiling.parse_steps("10:13") == (10, 13)
