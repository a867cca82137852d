"""One of two processes that hold four devices, read batches, gather, export.

python -m tests.training.batches_worker PROCESS PORT DIRECTORY
"""

import sys

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from sana_jax import sharding
from sana_jax.data import loader
from sana_jax.training import exporting, placement
from tests.training import parallel

# Devices 0 to 3 are the first process's. In the last, as with chips of 2 x 2 in
# a 4 x 4, a process has samples that are apart.
MESHES = {
  "samples": np.arange(8).reshape(2, 4, 1, 1),
  "rows": np.arange(8).reshape(1, 1, 1, 8),
  "copies": np.arange(8).reshape(1, 2, 2, 2).transpose(0, 2, 1, 3),
  "apart": np.arange(8).reshape(2, 2, 2, 1).transpose(1, 0, 2, 3),
}


def main() -> None:
  process, port = map(int, sys.argv[1:3])
  workdir = epath.Path(sys.argv[3])
  jax.distributed.initialize(f"localhost:{port}", 2, process)
  expected = next(parallel.read_batches(loader.Host(), 3))
  for name, order in MESHES.items():
    devices = np.asarray(jax.devices())[order]
    mesh = Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 4)
    config = parallel.make_config({"data": -1})
    batch = next(
      placement.global_batches(
        parallel.read_batches, config, mesh, first_step=3
      )
    )
    whole = multihost_utils.process_allgather(batch, tiled=True)
    jax.tree.map(np.testing.assert_array_equal, whole, expected)
    gathered = sharding.gather(batch)
    if process == 0:
      jax.tree.map(np.testing.assert_array_equal, gathered, expected)
    else:
      assert gathered is None
    for step in (1, 1, 2):
      export(name, batch, workdir / name, step)
    sys.stdout.write(f"{name} agrees\n")


def export(name, batch, workdir, step) -> None:
  """Exports a batch as if it were a model, and says so where it is written."""

  def write(arrays, frozen, path):
    assert (sorted(arrays), frozen) == (sorted(batch), {})
    path.mkdir(parents=True, exist_ok=True)
    sys.stdout.write(f"{name} writes step {step}\n")

  exporting.export(write, (batch, {}), workdir, step=step, is_new=False)


if __name__ == "__main__":
  main()
