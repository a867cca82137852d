"""Speeds of log lines, where calling a step is making it."""

import json
import subprocess
import sys

import numpy as np
import pytest

RUN = """
import sys
import jax
import jax.numpy as jnp
jax.config.update("jax_cpu_enable_async_dispatch", False)
from sana_jax.training import loop
from tests.training import test_loop

recipe = test_loop.make_recipe()

def slow(params, frozen, key, batch):
  loss, scalars = recipe.loss_fn(params, frozen, key, batch)
  square = jnp.full((500, 500), loss)
  for _ in range(4):
    square = jnp.sin(square @ square)
  return loss + 1e-20 * square.sum(), scalars

config = test_loop.make_config(log_every=1, mesh={"data": 1})
config.checkpoint.every = 2
loop.train(config, sys.argv[1], recipe._replace(loss_fn=slow))
"""


@pytest.mark.slow
def test_every_line_has_the_speed_of_its_own_step(tmp_path, monkeypatch):
  """Between two saves there are two steps, neither of which takes no time."""
  monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
  command = [sys.executable, "-c", RUN, str(tmp_path)]
  subprocess.run(command, check=True, timeout=300)
  rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
  seconds = [json.loads(row).get("seconds_per_step") for row in rows][1:]
  # It was a fiftieth; a loaded machine makes steps a few times longer.
  assert min(seconds) > 0.1 * float(np.mean(seconds))
