"""Plans what a pipeline runs to make pictures; every chip makes its own."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sana_jax import config as config_lib
from sana_jax import flops, hardware
from sana_jax.pipeline import footprint, memory
from sana_jax.plan import programs, roofline, topology

_GIB = 2**30
# What the instruction of SANA and a caption of full length are, in tokens.
_TOKEN_LENGTH = 510


class Plan(NamedTuple):
  """What making pictures takes.

  Attributes:
    title: what was compiled, for what.
    reason: of how the pipeline decodes, in its words.
    stages: what was measured of each program; see `measure`.
    hbm_bytes: that XLA can allocate on a chip.
    step_flops: of one step of the sampler, on one chip.
    seconds: of the steps of one picture, at the stated efficiency.
    prediction: for all chips, of the steps alone.
  """

  title: str
  reason: str
  stages: Sequence[Mapping[str, Any]]
  hbm_bytes: int
  step_flops: int
  efficiency: float
  seconds: float
  num_images: float
  prediction: roofline.Prediction
  versions: Mapping[str, str]


def plan(
  config: config_lib.TextToImageConfig,
  devices: topology.Topology,
  *,
  images: int = 1,
  num_steps: int = 20,
  height: int | None = None,
  width: int | None = None,
  efficiency: float = 0.5,
  num_images: float = 1e6,
) -> Plan:
  """Compiles the stages of a guided pipeline for one of the chips.

  Args:
    images: that a chip makes at a time.
    height: in pixels, as `width`; None: that the model is for.
    efficiency: share of the chip's peak that matrix products reach.

  Raises:
    ValueError: a model whose latents are not of the published autoencoder.
  """
  autoencoder = config_lib.DCAEConfig()
  if not isinstance(config, config_lib.TextToImageConfig) or (
    config.model.in_channels != autoencoder.latent_channels
  ):
    raise ValueError(
      "plan samples with a transformer of TextToImageConfig on latents of "
      f"{autoencoder.latent_channels} channels, the published autoencoder's."
    )
  configs = (config.text_encoder, config.model, autoencoder)
  models = programs.abstract_models(configs, jnp.dtype(config.dtype))
  work = programs.make_work(
    *configs[1:],
    height=height,
    width=width,
    batch=images,
    token_length=_TOKEN_LENGTH,
  )
  chip = hardware.CHIPS[devices.chip]
  chosen = memory.plan(
    footprint.Models(
      *map(footprint.make_part, configs, models),
      platform=topology.platform_of(devices.chip),
    ),
    work,
    policy=memory.Policy(),
    tiling=None,
    available=chip.hbm_bytes,
  )
  mesh = topology.first_chip(devices)
  stages = [
    measure(program, mesh, chosen, chip.hbm_bytes)
    for program in programs.programs(
      configs, models, work, chosen.decoding, num_steps
    )
  ]
  one = flops.forward(config.model, work.height, work.width)
  step_flops = images * work.branches * one
  seconds = num_steps * step_flops / (chip.flops * efficiency)
  chips = len(devices.devices)
  return Plan(
    f"sampling of {images} x {work.height}x{work.width}, {num_steps} steps "
    f"with guidance, on each chip of {devices}",
    chosen.reason,
    stages,
    chip.hbm_bytes,
    step_flops,
    efficiency,
    seconds,
    num_images,
    roofline.predict(
      seconds, batch_size=images * chips, chips=chips, num_images=num_images
    ),
    topology.versions(),
  )


def measure(
  program: programs.Program,
  mesh: jax.sharding.Mesh,
  plan: memory.Plan,
  available: int,
) -> dict[str, Any]:
  """Compiles a program; returns a record of bytes, predicted and XLA's."""
  start = time.monotonic()
  sizes = topology.memory_analysis(
    program.function,
    mesh,
    program.model,
    *program.args,
  )
  need = plan.needs[program.stage]
  inputs = footprint.nbytes(program.args)
  working = (
    inputs
    + sizes.output_size_in_bytes
    - sizes.alias_size_in_bytes
    + sizes.temp_size_in_bytes
    + sizes.generated_code_size_in_bytes
    + program.beside
  )
  total = need.weights + working
  return {
    "stage": program.stage,
    "program": program.name,
    "weights": need.weights,
    "predicted": need.working,
    "inputs": inputs + program.beside,
    "temporaries": sizes.temp_size_in_bytes,
    "outputs": sizes.output_size_in_bytes,
    "code": sizes.generated_code_size_in_bytes,
    "working": working,
    "total": total,
    "fits": total <= available,
    "compile_seconds": round(time.monotonic() - start),
  }


def text(plan: Plan) -> str:
  """Writes a plan for reading."""
  lines = [
    plan.title,
    f"  {plan.reason}",
    "",
    "memory of a chip, GiB              weights  beside them    total",
  ]
  for stage in plan.stages:
    name = f"{stage['stage']}, {stage['program']}"
    sizes = (stage[key] / _GIB for key in ("weights", "working", "total"))
    figures = "{:9.2f} {:12.2f} {:8.2f}".format(*sizes)
    fits = "fits" if stage["fits"] else "DOES NOT FIT"
    lines.append(f"  {name:31} {figures}  {fits}")
  prediction = plan.prediction
  return "\n".join(
    [
      *lines,
      f"  of {plan.hbm_bytes / _GIB:.2f}",
      "",
      f"operations: {plan.step_flops / 1e12:.1f} TFLOP a step and chip",
      f"steps alone: {plan.seconds:.2f} s at {plan.efficiency:.0%} of the "
      f"peak, {prediction.images_per_second:.1f} images/s; "
      f"{plan.num_images:g} images in {prediction.hours:.1f} h, "
      f"{prediction.chip_hours:,.0f} chip-hours",
    ]
  )


def record(plan: Plan) -> dict[str, Any]:
  """Returns a plan as JSON can hold it."""
  return {
    **plan._asdict(),
    "prediction": plan.prediction._asdict(),
    "versions": dict(plan.versions),
  }
