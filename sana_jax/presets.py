"""Mesh, parts of a batch and compiler options for a kind and number of chips.

The batch of all devices, and so what is learned, stays that of the config; only
how it is spread changes. Any value may still be set after a preset.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

from sana_jax import config as config_lib
from sana_jax import hardware
from sana_jax.config import near

# Source of all of these: the flags that MaxText runs with
# (github.com/AI-Hypercomputer/maxtext), here those that let the gathering of
# sharded parameters run beside the computation.
_TPU_OPTIONS = {
  "xla_enable_async_all_gather": True,
  "xla_tpu_enable_async_collective_fusion": True,
  "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
  "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
  "xla_tpu_overlap_compute_collective_tc": True,
}
# Source: docs.jax.dev/en/latest/gpu_performance_tips.html.
_GPU_OPTIONS = {"xla_gpu_enable_latency_hiding_scheduler": True}

_NAME = re.compile(r"([a-z]\w*)-([1-9]\d*)(?:x([1-9]\d*))?")
# Devices that parameters are spread over at most: in a slice, 64 is the largest
# power of two in SANA's width of 2240; of GPUs, those of a box.
_MOST_SHARDS = {"tpu": 64, "gpu": 8}
_MOST_SEQUENCE_SHARDS = 16
# That are looked at where a number does not do: those of the largest slice, as
# a power of two.
_MOST_CHIPS = 8192
# Of the memory that XLA may allocate: what we count on, and of that what the
# state may have.
_USABLE, _OF_STATE = 0.85, 0.3
# Per parameter: itself and its gradient, and its average, in float32; and the
# moments of the optimiser.
_STATE_BYTES, _AVERAGE_BYTES = 8, 4
_MOMENT_BYTES = {
  "adafactor": 0,
  "adamw": 8,
  "came": 4,
  "came_8bit": 1,
  "lion": 4,
  "muon": 4,
}
# Per token and feature, under remat="full": the input of every block, and what
# the block at work needs. Compiled for v5p, 1.6B took 11.4 GiB beside its state
# for 16 pictures of 1024 pixels: 4 * 20 + 253.
_BLOCK_INPUT_BYTES, _WORK_BYTES = 4, 256


class Hardware(NamedTuple):
  """What a name such as "v5e-256" or "v5p-128x2" means.

  Attributes:
    chip: see `hardware.CHIPS`.
    chips: of a slice, or of all boxes.
    slices: that a slower network connects.
  """

  chip: str
  chips: int
  slices: int

  @property
  def kind(self) -> str:
    return "tpu" if self.chip.startswith("v") else "gpu"


class Layout(NamedTuple):
  """How a batch and a model are spread.

  Attributes:
    mesh: sizes of the axes.
    accumulation: parts that a batch is taken in.
    rows: pictures that a device has at a time; a share of one, if a picture is
      spread over several.
  """

  mesh: dict[str, int]
  accumulation: int
  rows: float


def parse(name: str) -> Hardware:
  """Reads "v5e-256": kind and number of chips; "x2" after it: two slices.

  Raises:
    ValueError: it is something else, or no chip that is known.
  """
  match = _NAME.fullmatch(name)
  if match is None or match[1] not in hardware.CHIPS:
    kind, dash, number = name.partition("-")
    meant = [f"{one}{dash}{number}" for one in near.find(kind, hardware.CHIPS)]
    raise ValueError(
      f"hardware {name!r} is not a kind of chip and their number, such as "
      f"'v5e-256', 'v5p-128x2' (two slices) or 'h100-8'; kinds: "
      f"{', '.join(hardware.CHIPS)}."
      f"{near.question(one for one in meant if _NAME.fullmatch(one))}"
    )
  found = Hardware(match[1], int(match[2]), int(match[3] or 1))
  if found.kind == "gpu" and found.slices > 1:
    raise ValueError(
      f"hardware {name!r}: of GPUs, give the number in all boxes, "
      f"{found.chip}-{found.chips * found.slices}."
    )
  return found


def apply(
  config: config_lib.TextToImageConfig, name: str | None
) -> config_lib.TextToImageConfig:
  """Sets what the hardware decides; None leaves the config as it is.

  Raises:
    ValueError: see `parse` and `lay_out`.
  """
  if name is None:
    return config
  target = parse(name)
  try:
    layout = lay_out(config, target)
  except ValueError as error:
    meant = near.question(_near_counts(config, target))
    raise ValueError(f"{error}{meant}") from error
  # All axes, so that flags can change each.
  config.mesh = dict.fromkeys(config.mesh, 1) | layout.mesh
  config.optim.accumulation = layout.accumulation
  config.remat = "full"
  config.hardware.preset = name
  options = _TPU_OPTIONS if target.kind == "tpu" else _GPU_OPTIONS
  config.hardware.compiler_options = dict(options)
  return config


def lay_out(config: config_lib.TextToImageConfig, target: Hardware) -> Layout:
  """Finds the least sharding, and the fewest parts of a batch, that fit.

  Parameters are sharded until the state takes 30 % of the memory. Then a
  picture's tokens are, if there are more devices than pictures, or a picture is
  too large for one. Batches are taken in parts, if all is too much at a time.
  Memory is estimated; `sana_jax.plan` asks the compiler.

  Raises:
    ValueError: the batch cannot be spread so, or nothing fits.
  """
  usable = _USABLE * hardware.CHIPS[target.chip].hbm_bytes
  state = state_bytes(config)
  most = math.gcd(target.chips, _MOST_SHARDS[target.kind])
  fsdp = next(
    (n for n in _powers(most) if state / n <= _OF_STATE * usable), most
  )
  free = usable - state / fsdp
  if free <= 0:
    raise ValueError(
      f"{target.chips} {target.chip} do not hold the state: parameters, "
      f"average, gradients and moments are {state / 2**30:.0f} GiB, cut in "
      f"{fsdp} {state / fsdp / 2**30:.1f} of the {usable / 2**30:.1f} GiB of a "
      "chip. "
      "Take more chips, or an optimiser with a smaller state (optim.name)."
    )
  picture = picture_bytes(config)
  devices = target.chips * target.slices
  most = math.gcd(target.chips // fsdp, _MOST_SEQUENCE_SHARDS)
  for sequence in _powers(most):
    groups = devices // sequence
    if config.batch_size % groups or picture / sequence > free:
      continue
    rows = config.batch_size // groups
    parts = next(
      n
      for n in range(1, rows + 1)
      if rows % n == 0 and rows // n * picture / sequence <= free
    )
    mesh = {"data": groups // fsdp, "fsdp": fsdp}
    if sequence > 1:
      mesh["sequence"] = sequence
    return Layout(mesh, parts, rows / parts / sequence)
  raise ValueError(
    f"batch_size {config.batch_size} does not spread over {devices} "
    f"{target.chip}: it must be a multiple of their number, which up to {most} "
    f"that share a picture divide, and a picture needs {picture / 2**30:.1f} "
    f"GiB of the {free / 2**30:.1f} that the state leaves. Take another number "
    "of chips, or another batch."
  )


def _near_counts(
  config: config_lib.TextToImageConfig, target: Hardware
) -> list[str]:
  """Names numbers of these chips that are spelt like it, and would do."""
  slices = f"x{target.slices}" if target.slices > 1 else ""
  name = f"{target.chip}-{target.chips}{slices}"
  counts = {
    f"{target.chip}-{chips}{slices}": chips for chips in _powers(_MOST_CHIPS)
  }

  def fits(chips: int) -> bool:
    try:
      lay_out(config, target._replace(chips=chips))
    except ValueError:
      return False
    return True

  usable = [name for name, chips in counts.items() if fits(chips)]
  return near.find(name, usable)


def check_devices(config: config_lib.TrainConfig, devices: int) -> None:
  """Refuses a preset for other devices than there are.

  Raises:
    ValueError: there is a preset, and its mesh does not fit `devices`.
  """
  name = config.hardware.preset
  known = math.prod(size for size in config.mesh.values() if size != -1)
  free = -1 in config.mesh.values()
  if name is None or known == devices or (free and devices % known == 0):
    return
  target = parse(name)
  raise ValueError(
    f"preset {name!r} is for {target.chips * target.slices} devices, got "
    f"{devices}: begin with a preset for {devices} (--config=FILE:KIND-"
    f"{devices}), with none (--config=FILE), or set all axes of the mesh, now "
    f"{dict(config.mesh)} (--config.mesh.data=N and its like)."
  )


def state_bytes(config: config_lib.TextToImageConfig) -> float:
  """Estimates parameters, average, gradients and moments, in all."""
  each = _STATE_BYTES + _MOMENT_BYTES[config.optim.name]
  if config.ema_decay > 0:
    each += _AVERAGE_BYTES
  return each * num_params(config.model)


def num_params(model: config_lib.SanaConfig) -> float:
  """Estimates the number of parameters, from the matrices alone."""
  # Two attentions of four matrices, and the three of the feed-forward network.
  block = 8 + 3 * model.mlp_ratio
  outside = model.caption_channels * model.width + 8 * model.width**2
  return model.num_layers * block * model.width**2 + outside


def picture_bytes(config: config_lib.TextToImageConfig) -> float:
  """Estimates what a square picture needs while it is trained on."""
  tokens = (config.model.sample_size // config.model.patch_size) ** 2
  per_feature = _BLOCK_INPUT_BYTES * config.model.num_layers + _WORK_BYTES
  return tokens * config.model.width * per_feature


def describe(config: config_lib.TrainConfig, mesh: Mapping[str, int]) -> str:
  """Says in one line how a run is spread, and what its compiler is told.

  Args:
    mesh: sizes of the axes as they are, where the config has -1.
  """
  told = config.hardware.compiler_options
  options = " ".join(f"{name}={value}" for name, value in told.items())
  mesh = " ".join(f"{k}={v}" for k, v in mesh.items() if v != 1)
  return (
    f"preset {config.hardware.preset or 'none'}: "
    f"mesh {mesh or 'of one device'}, batch {config.batch_size} in "
    f"{config.optim.accumulation} part(s), remat {config.remat}, "
    f"compiler options: {options or 'none'}"
  )


def _powers(most: int) -> list[int]:
  return [2**n for n in range(most.bit_length()) if most % 2**n == 0]
