"""One chip of a TPU that need not be there, to compile for."""

import os

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

# Bytes that XLA can allocate on a chip: what it names when it runs out of them.
HBM_BYTES = {"v5e": int(15.75 * 2**30)}

# Tells libtpu not to look for the metadata server of a TPU machine, and to be
# silent about it.
_LIBTPU_SETTINGS = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_MIN_LOG_LEVEL": "3",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_WORKER_ID": "0",
}


def one_chip(topology: str) -> Mesh:
  """Returns a mesh of the first chip of a topology such as "v5e:2x2".

  Call it before anything else that may load libtpu.

  Raises:
    ValueError: a topology of a kind that is not in `HBM_BYTES`.
    RuntimeError: libtpu is not installed.
  """
  kind = topology.partition(":")[0]
  if kind not in HBM_BYTES:
    raise ValueError(
      f"topology {topology!r} is not one of {sorted(HBM_BYTES)}, such as "
      "v5e:2x2."
    )
  for name, value in _LIBTPU_SETTINGS.items():
    os.environ.setdefault(name, value)
  described = topologies.get_topology_desc(
    platform="tpu", topology_name=topology
  )
  return Mesh(np.asarray(described.devices[:1]), ("data",))


def memory_analysis(function, mesh: Mesh, *args):
  """Compiles `function` for abstract arguments, all on the chip of `mesh`.

  Returns XLA's account of its memory.
  """
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  placed = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      np.shape(leaf), leaf.dtype, sharding=sharding
    ),
    args,
  )
  return jax.jit(function).lower(*placed).compile().memory_analysis()
