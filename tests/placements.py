"""Where every parameter of the published models is, as a table to review.

python -m tests.placements > tests/placements.txt
"""

import os
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
from flax import nnx

from sana_jax import config as config_lib
from sana_jax import sharding, tree
from sana_jax.models import sana

PRESETS = {
  "sana_600m": config_lib.sana_600m,
  "sana_1600m": config_lib.sana_1600m,
}
MESHES = ({"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2})


def table() -> str:
  """One line a parameter: its shape, and its PartitionSpec."""
  lines = []
  for preset, make_config in PRESETS.items():
    shapes = jax.eval_shape(
      lambda: sana.SanaTransformer.from_config(
        make_config(),  # noqa: B023
        rngs=nnx.Rngs(0),
      )
    )
    for axes in MESHES:
      mesh = sharding.make_mesh(axes)
      places = sharding.param_shardings(shapes, sana.PARAM_AXES, mesh)
      lines.append(f"{preset} on {axes}")
      for name, shape, place in zip(
        tree.leaf_names(shapes),
        jax.tree.leaves(shapes),
        jax.tree.leaves(places),
        strict=True,
      ):
        lines.append(f"  {name} {shape.shape} {tuple(place.spec)}")
  return "\n".join(lines) + "\n"


if __name__ == "__main__":
  sys.stdout.write(table())
