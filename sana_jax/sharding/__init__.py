"""Placing arrays on devices: a mesh of four axes, and tables of rules.

A model file ends with PARAM_AXES, rows of (regex, logical axes). RULES map
logical axes to mesh axes, and one table serves every mesh: an axis of size one
does nothing. Modules know nothing of placement but for `constrain`, which is a
no-op unless a mesh is in `use`.
"""

from sana_jax.sharding.arrays import gather, place
from sana_jax.sharding.context import (
  compiler_axes,
  constrain,
  platform,
  shards,
  spec,
  use,
)
from sana_jax.sharding.gathering import gather_shards
from sana_jax.sharding.mesh import AXES, make_mesh
from sana_jax.sharding.parameters import (
  ParamAxes,
  check_every_axis_cuts,
  param_shardings,
)
from sana_jax.sharding.rules import (
  REPLICATED_RULES,
  RULES,
  Axes,
  Rules,
  batch_sharding,
  replicated,
)

__all__ = [
  "AXES",
  "REPLICATED_RULES",
  "RULES",
  "Axes",
  "ParamAxes",
  "Rules",
  "batch_sharding",
  "check_every_axis_cuts",
  "compiler_axes",
  "constrain",
  "gather",
  "gather_shards",
  "make_mesh",
  "param_shardings",
  "place",
  "platform",
  "replicated",
  "shards",
  "spec",
  "use",
]
