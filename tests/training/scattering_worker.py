"""Trains three steps with gradients scattered on CPUs, and without.

python -m tests.training.scattering_worker

A process of its own: on CPUs, exchanges of a program that do not need each
other's results may wait for one another for ever. In float32, where they are
put in one order, and on few devices, they were not seen to.
"""

import collections
import sys

import jax
import numpy as np

from sana_jax import config as config_lib
from sana_jax import sharding
from tests.training import parallel

ONE_ORDER = {"xla_cpu_enable_concurrency_optimized_scheduler": False}
MESH = {"data": 1, "fsdp": 4}


def train(platform):
  """Returns the kinds of collectives, the losses and the parts of the state.

  Args:
    platform: that layers take the devices for.
  """
  sharding.platform = lambda: platform
  run = parallel.make_run(
    *(MESH, jax.devices()[:4]),
    num_layers=1,
    hardware=config_lib.HardwareConfig(compiler_options=ONE_ORDER),
  )
  batches, key, losses = run.batches(), jax.random.key(1), []
  state = run.program.init(jax.random.key(0))
  # Compiled once: the text is that of what runs.
  step = run.program.step.lower(
    state, run.frozen, key, next(run.batches())
  ).compile()
  for _ in range(3):
    state, scalars = step(state, run.frozen, key, next(batches))
    losses.append(float(scalars["loss"]))
  found = parallel.collectives(step.as_text())
  kinds = collections.Counter(collective.kind for collective in found)
  return kinds, losses, jax.device_get(state)


def main() -> None:
  jax.config.update("jax_disable_most_optimizations", True)
  kinds, losses, state = train("cpu")
  assert kinds["reduce-scatter"] == 0, kinds
  scattering_kinds, scattering_losses, scattering_state = train("tpu")
  assert scattering_kinds["reduce-scatter"] > 10, scattering_kinds
  assert losses[2] < losses[0], losses
  np.testing.assert_allclose(scattering_losses, losses, rtol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
    *(scattering_state, state),
  )
  sys.stdout.write(f"equal after {len(losses)} steps\n")


if __name__ == "__main__":
  main()
