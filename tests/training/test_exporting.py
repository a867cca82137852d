"""The product of a run is written once for every step that it is of."""

import shutil

import pytest

from sana_jax.training import loop
from tests.training import test_loop


def make_recipe(written, fails=False):
  def export(params, frozen, path):
    if fails:
      raise OSError("the disk is full")
    path.mkdir(exist_ok=True)
    written.append(path)

  return test_loop.make_recipe()._replace(export=export)


def test_a_finished_command_exports_nothing_again(tmp_path):
  written = []

  def train(num_steps, **changes):
    config = test_loop.make_config(num_steps=num_steps)
    loop.train(config, tmp_path, make_recipe(written, **changes))
    return len(written)

  assert train(4) == 1
  assert train(4) == 1
  # A longer run has another model.
  assert train(6) == 2
  assert train(6) == 2
  shutil.rmtree(tmp_path / "export")
  assert train(6) == 3
  # The same step, trained anew.
  shutil.rmtree(tmp_path / "checkpoints")
  with pytest.raises(OSError, match="the disk is full"):
    train(6, fails=True)
  # What was not written to its end is written again.
  assert train(6) == 4
  assert train(6) == 4
