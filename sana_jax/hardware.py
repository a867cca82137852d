"""What an accelerator can do, as its maker states it."""

from collections.abc import Mapping
from typing import NamedTuple

import jax


class Chip(NamedTuple):
  """One chip, which is one device of JAX.

  Attributes:
    flops: bfloat16 operations per second.
    hbm_bytes: that XLA can allocate.
    hbm_bandwidth: bytes per second.
    link_bandwidth: bytes per second and direction to the chips of the same
      slice or box, all links together.
    network_bandwidth: bytes per second and direction to other slices or boxes,
      a chip's share of its host's.
    kinds: what `jax.Device.device_kind` says, or starts with.
  """

  flops: float
  hbm_bytes: int
  hbm_bandwidth: float
  link_bandwidth: float
  network_bandwidth: float
  kinds: tuple[str, ...]


def _gib(number: float) -> int:
  return int(number * 2**30)


# Sources: the vendors' data sheets, for TPUs docs.cloud.google.com/tpu/docs
# (v5e, v5p-training, v6e); the bytes are those XLA names when it runs out of
# them (TPU), or 92 % of the memory, by its default (GPU). A ring along one axis
# of a torus has 2 of the 4 links of v5e and v6e, or of the 6 of v5p.
CHIPS: Mapping[str, Chip] = {
  "v5e": Chip(
    *(197e12, _gib(15.75), 819e9, 200e9, 3.125e9),
    kinds=("TPU v5 lite", "TPU v5e"),
  ),
  "v5p": Chip(
    *(459e12, _gib(95.74), 2765e9, 600e9, 6.25e9), kinds=("TPU v5", "TPU v5p")
  ),
  "v6e": Chip(
    *(918e12, _gib(31.25), 1640e9, 400e9, 12.5e9),
    kinds=("TPU v6 lite", "TPU v6e"),
  ),
  "a100": Chip(
    *(312e12, _gib(0.92 * 79.2), 2039e9, 300e9, 25e9), kinds=("NVIDIA A100",)
  ),
  "h100": Chip(
    *(989e12, _gib(0.92 * 79.2), 3350e9, 450e9, 50e9), kinds=("NVIDIA H100",)
  ),
  "h200": Chip(
    *(989e12, _gib(0.92 * 139.8), 4800e9, 450e9, 50e9), kinds=("NVIDIA H200",)
  ),
}


def chip_of(device: jax.Device) -> str | None:
  """Returns the name of a device's chip in `CHIPS`; None: not known."""
  matches = [
    (len(kind), name)
    for name, chip in CHIPS.items()
    for kind in chip.kinds
    if device.device_kind.startswith(kind)
  ]
  # "TPU v5 lite" starts with "TPU v5", too: the longest says most.
  return max(matches)[1] if matches else None
