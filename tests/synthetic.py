"""Writes full-size checkpoints of random numbers, and measures loading them.

python -m tests.synthetic write DIR --preset=sana_1600m --dtype=float32
python -m tests.synthetic load DIR --dtype=bfloat16 --devices=8
"""

import argparse
import functools
import json
import os
import pathlib
import re
import tempfile
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.models import sana
from sana_jax.weights import components, files, mapping
from sana_jax.weights import sana as sana_weights

_BLOCK = 1 << 20


def write_transformer(
  directory: pathlib.Path,
  config: config_lib.SanaConfig,
  *,
  dtype: np.dtype = np.float32,
  max_shard_bytes: int = 5 * 10**9,
) -> None:
  """Writes a transformer/ directory, one tensor at a time in memory."""
  abstract = jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0))
  )
  shapes = mapping.expected_shapes(
    abstract, sana_weights.diffusers_rules(config)
  )
  noise = 0.02 * np.random.default_rng(0).normal(size=_BLOCK)
  noise = noise.astype(dtype)
  tensors = {
    name: files.Tensor(
      shape, noise.dtype, functools.partial(_tile, noise, name, shape)
    )
    for name, shape in shapes.items()
  }
  files.write_component(
    directory,
    {"_class_name": "SanaTransformer2DModel", **config.to_dict()},
    tensors,
    max_shard_bytes=max_shard_bytes,
  )


def _tile(noise: np.ndarray, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Repeats the noise from a place that differs from tensor to tensor."""
  start = zlib.crc32(name.encode()) % noise.size
  return np.resize(np.roll(noise, start), shape)


def measure_load(
  directory: pathlib.Path, *, dtype: str, fsdp: int
) -> dict[str, float]:
  """Loads in this process and returns megabytes and seconds.

  Run it in a fresh process: the peak is that of the whole process.
  """
  mesh = sharding.make_mesh({"fsdp": fsdp}, jax.devices()[:fsdp])
  _load_a_tiny_one()
  baseline, start = _memory("VmRSS"), time.monotonic()
  model, _ = components.load_transformer(
    directory, dtype=jnp.dtype(dtype), mesh=mesh if fsdp > 1 else None
  )
  seconds = time.monotonic() - start
  held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(model)
    for shard in leaf.addressable_shards
  )
  by_device = {}
  for leaf in jax.tree.leaves(model):
    for shard in leaf.addressable_shards:
      by_device.setdefault(shard.device, []).append(shard.data.nbytes)
  return {
    "baseline_mb": baseline,
    "peak_mb": _memory("VmHWM") - baseline,
    "held_mb": held / 1e6,
    "largest_device_mb": max(map(sum, by_device.values())) / 1e6,
    "seconds": round(seconds, 1),
  }


def _load_a_tiny_one() -> None:
  """Loads something, so that the code this needs is not counted."""
  config = config_lib.SanaConfig(
    num_attention_heads=2,
    num_layers=2,
    num_cross_attention_heads=1,
    cross_attention_head_dim=64,
    cross_attention_dim=64,
  )
  with tempfile.TemporaryDirectory() as directory:
    write_transformer(pathlib.Path(directory), config)
    components.load_transformer(directory, dtype=jnp.bfloat16)


def peak_memory_reset() -> float:
  """Forgets the peak so far, and returns what is in use, in megabytes."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return _memory("VmRSS")


def peak_memory() -> float:
  return _memory("VmHWM")


def _memory(name: str) -> float:
  status = pathlib.Path("/proc/self/status").read_text()
  return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024 / 1e6


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("command", choices=["write", "load"])
  parser.add_argument("directory", type=pathlib.Path)
  parser.add_argument("--preset", default="sana_1600m")
  parser.add_argument("--layers", type=int)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--devices", type=int, default=1)
  args = parser.parse_args()
  if args.command == "write":
    config = getattr(config_lib, args.preset)()
    config.num_layers = args.layers or config.num_layers
    write_transformer(args.directory, config, dtype=jnp.dtype(args.dtype))
    return
  os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={args.devices}"
  )
  found = measure_load(args.directory, dtype=args.dtype, fsdp=args.devices)
  print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
  main()
