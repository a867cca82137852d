"""Weights & Biases, offline: one run over several starts."""

import importlib.util

import numpy as np
import pytest

from sana_jax.training import wandb_sink

installed = importlib.util.find_spec("wandb") is not None


@pytest.mark.skipif(installed, reason="wandb is installed")
def test_without_the_package_one_is_told_how_to_get_it(tmp_path):
  with pytest.raises(ModuleNotFoundError, match=r"sana_jax\[wandb\]"):
    wandb_sink.WandbSink(tmp_path, "project", {})


@pytest.mark.slow
@pytest.mark.skipif(not installed, reason="needs wandb")
def test_a_resumed_run_goes_on_under_its_own_id(tmp_path, monkeypatch, rng):
  monkeypatch.setenv("WANDB_MODE", "offline")
  ids = []
  for start in range(2):
    sink = wandb_sink.WandbSink(tmp_path, "project", {"batch_size": 8})
    sink.scalars(start + 1, {"loss": 0.5})
    picture = rng.integers(0, 256, (4, 6, 3)).astype(np.uint8)
    sink.images(start + 1, "samples", picture)
    assert dict(sink._run.config)["batch_size"] == 8
    ids.append(sink._run.id)
    sink.close()
  assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text()
  assert len(list((tmp_path / "wandb").glob("offline-run-*"))) >= 1
