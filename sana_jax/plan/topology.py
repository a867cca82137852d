"""Devices that need not be there, to compile for.

XLA compiles for a TPU wherever libtpu is installed, and for a GPU wherever the
CUDA plugin of JAX is, given a description of the GPU. Call `describe` before
anything else that may load either.
"""

import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from sana_jax import hardware

GPUS_PER_BOX = 8

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


class Gpu(NamedTuple):
  """What XLA asks about a GPU.

  Attributes:
    capability: the compute capability.
    cores: streaming multiprocessors.
    clock_ghz: the boost clock.
    shared_kib: of shared memory of a multiprocessor, and of that what one
      block may take.
  """

  name: str
  capability: tuple[int, int]
  cores: int
  clock_ghz: float
  memory_bytes: int
  memory_bandwidth: float
  l2_bytes: int
  shared_kib: tuple[int, int]


# Sources: NVIDIA's A100, H100 and H200 data sheets, and the table of compute
# capabilities 8.0 and 9.0 in the CUDA C++ Programming Guide.
GPUS: Mapping[str, Gpu] = {
  "a100": Gpu(
    *("NVIDIA A100-SXM4-80GB", (8, 0), 108, 1.41, 80 * 2**30, 2039e9),
    *(40 * 2**20, (164, 163)),
  ),
  "h100": Gpu(
    *("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98, 80 * 2**30, 3350e9),
    *(50 * 2**20, (228, 227)),
  ),
  "h200": Gpu(
    *("NVIDIA H200", (9, 0), 132, 1.98, 141 * 10**9, 4800e9),
    *(50 * 2**20, (228, 227)),
  ),
}
# The same for all of them.
_GPU_LIMITS = """\
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
"""
_FPUS_PER_CORE = {8: 64, 9: 128}


class Topology(NamedTuple):
  """Devices that are not there.

  Attributes:
    chip: of `hardware.CHIPS`.
    devices: in the order of their ids; slice after slice.
    num_slices: slices of a TPU, or boxes of GPUs, with a slower network
      between them.
  """

  name: str
  chip: str
  devices: tuple[jax.Device, ...]
  num_slices: int

  def __str__(self) -> str:
    slices = f"{self.num_slices} x " if self.num_slices > 1 else ""
    return f"{slices}{self.name} ({len(self.devices)} chips)"


def describe(name: str, *, num_slices: int = 1) -> Topology:
  """Returns the devices of "v5e:16x16", "v5p:4x4x4" or "h100:8".

  Raises:
    ValueError: a chip or an arrangement of chips that is not known.
    ModuleNotFoundError: what compiles for the chip is not installed.
  """
  chip, _, shape = name.partition(":")
  if chip not in hardware.CHIPS or not shape:
    raise ValueError(
      f"topology {name!r} is not one of {sorted(hardware.CHIPS)} with a shape, "
      "such as v5e:16x16, v5p:4x4x4 or h100:8."
    )
  if num_slices < 1:
    raise ValueError(f"num_slices must be at least 1, got {num_slices}.")
  make = _gpus if chip in GPUS else _tpus
  try:
    devices = make(name, chip, shape, num_slices)
  except RuntimeError as error:
    raise ValueError(
      f"topology {name!r} cannot be made: {' '.join(str(error).split())}"
    ) from error
  return Topology(name, chip, tuple(devices), num_slices)


def platform_of(chip: str) -> str:
  """Returns what JAX calls the kind of a chip of `hardware.CHIPS`."""
  return "gpu" if chip in GPUS else "tpu"


def compiler_options(mesh: Mesh) -> Mapping[str, bool | int]:
  """Returns what compiling for devices that are not there takes.

  XLA would time kernels of matrix products on the GPU; without that, it finds
  no tiles for some it generates, and libraries' must do.
  """
  if mesh.devices.flat[0].platform != "gpu":
    return {}
  return {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


def first_chip(topology: Topology) -> Mesh:
  """Returns a mesh of one chip."""
  return Mesh(np.asarray(topology.devices[:1]), ("data",))


def one_chip(name: str) -> Mesh:
  """Returns a mesh of the first chip of a topology such as "v5e:2x2".

  Raises:
    ValueError: a topology that is not known.
    ModuleNotFoundError: what compiles for the chip is not installed.
  """
  return first_chip(describe(name))


def target_config(chip: str) -> str:
  """Describes a GPU to XLA, in its text format.

  Source: the fields of GpuTargetConfigProto in XLA's device_description.proto.
  """
  gpu = GPUS[chip]
  per_core, per_block = (1024 * kib for kib in gpu.shared_kib)
  major, minor = gpu.capability
  return f"""\
gpu_device_info {{
{_GPU_LIMITS}  shared_memory_per_core: {per_core}
  shared_memory_per_block_optin: {per_block}
  core_count: {gpu.cores}
  fpus_per_core: {_FPUS_PER_CORE[major]}
  clock_rate_ghz: {gpu.clock_ghz}
  memory_bandwidth: {int(gpu.memory_bandwidth)}
  device_memory_size: {gpu.memory_bytes}
  l2_cache_size: {gpu.l2_bytes}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{gpu.name}"
"""


def versions() -> dict[str, str]:
  """Returns the versions of what compiles, of those that are installed."""
  found = {}
  for name in ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def memory_analysis(
  function: Callable[..., Any],
  mesh: Mesh,
  *args: Any,
):
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
  # Kernels are lowered for the chips of the mesh in use.
  with jax.set_mesh(mesh):
    lowered = jax.jit(function).lower(*placed)
  return lowered.compile(dict(compiler_options(mesh))).memory_analysis()


def _tpus(name: str, chip: str, shape: str, num_slices: int):
  del chip, shape
  if importlib.util.find_spec("libtpu") is None:
    raise ModuleNotFoundError(
      f"Compiling for {name} takes libtpu, which brings XLA's compiler for "
      'TPUs and needs none: pip install "jax[tpu]".'
    )
  for variable, value in _LIBTPU_SETTINGS.items():
    os.environ.setdefault(variable, value)
  slices = {"num_slices": num_slices} if num_slices > 1 else {}
  return topologies.get_topology_desc(
    platform="tpu", topology_name=name, **slices
  ).devices


def _gpus(name: str, chip: str, shape: str, num_slices: int):
  if not shape.isdecimal() or not 1 <= int(shape) <= GPUS_PER_BOX:
    raise ValueError(
      f"topology {name!r}: a box holds 1 to {GPUS_PER_BOX} GPUs, such as "
      f"{chip}:{GPUS_PER_BOX}; more boxes are num_slices."
    )
  if not _has_cuda_plugin():
    version = jax.__version__
    raise ModuleNotFoundError(
      f"Compiling for {name} takes the CUDA plugin of JAX, and neither a GPU "
      f"nor its driver: pip install --no-deps jax-cuda13-plugin=={version} "
      f"jax-cuda13-pjrt=={version} nvidia-cuda-nvcc nvidia-nvvm."
    )
  return topologies.get_topology_desc(
    chip,
    "cuda",
    target_config=target_config(chip),
    topology=f"{num_slices}x1x{shape}",
  ).devices


def _has_cuda_plugin() -> bool:
  if importlib.util.find_spec("jax_plugins") is None:
    return False
  return importlib.util.find_spec("jax_plugins.xla_cuda13") is not None
