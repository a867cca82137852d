"""Plans the training step of a run."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections.config_flags import config_path

from sana_jax import config as config_lib
from sana_jax import hardware, presets, sharding
from sana_jax.plan import (
  collectives,
  compilation,
  report,
  roofline,
  suggest,
  theory,
  topology,
)

_COMPRESSION = 32


def plan(
  config: config_lib.TextToImageConfig,
  devices: topology.Topology,
  *,
  height: int | None = None,
  width: int | None = None,
  efficiency: float = 0.5,
  num_images: float = 1e6,
) -> report.Plan:
  """Compiles the step on latents and text states, and predicts the run.

  Args:
    height: of the images, in pixels, as `width`; None: that the model is for.
    efficiency: share of the chip's peak that matrix products reach.

  Raises:
    ValueError: the run, its batch or its mesh do not fit the devices.
  """
  check_config(config)
  latent_size = latents_of(config, height, width)
  mesh = sharding.make_mesh(config.mesh, devices.devices)
  step = compilation.make_step(config, mesh, latent_size)
  compiled = compilation.compile_step(step, topology.compiler_options(mesh))
  study = suggest.Study(
    config,
    step.program,
    hardware.CHIPS[devices.chip],
    latent_size,
    efficiency,
    num_images,
    devices.num_slices,
  )
  if compiled.memory:
    study = suggest.calibrated(study, mesh, compiled.memory["temporaries"])
  return _assemble(study, devices, mesh, compiled)


def check_config(config: config_lib.Config) -> None:
  """Refuses what cannot be planned.

  Raises:
    ValueError: another recipe, or one that trains on tokens.
  """
  if isinstance(config, config_lib.StagesConfig):
    raise ValueError(
      f"plan is for one run, got a StagesConfig of {', '.join(config.stages)}: "
      "plan each by a config of its own, such as configs/sana_1600m_1024.py."
    )
  if not isinstance(config, config_lib.TextToImageConfig):
    raise ValueError(
      f"plan is for runs of TextToImageConfig, got {type(config).__name__}."
    )
  if config.train_text_encoder:
    raise ValueError(
      "plan is for steps on latents and text states that were computed before: "
      "train_text_encoder must be False."
    )


def complete(
  config: config_lib.TextToImageConfig,
  devices: topology.Topology,
  given: Mapping[str, Any],
) -> None:
  """Fills in what a plan can do without, and a run cannot.

  Where no data are named, none are needed; where the mesh was left alone, it is
  the preset's for these chips, as `configs/x.py:v5e-256` would set it.

  Args:
    given: values of flags by path, such as {"optim.accumulation": 4}, that the
      config has already; a preset leaves them.

  Raises:
    ValueError: the batch does not spread over the chips, or the config has
      the preset of another number of them.
  """
  if not config.data.places and not config.data.cache:
    config.data.synthetic = True
  untouched = config.mesh == config_lib.TextToImageConfig().mesh and not any(
    path.startswith("mesh.") for path in given
  )
  if config.hardware.preset is None and untouched:
    chips, slices = len(devices.devices), devices.num_slices
    per_slice = topology.platform_of(devices.chip) == "tpu" and slices > 1
    name = f"{chips // slices}x{slices}" if per_slice else f"{chips}"
    presets.apply(config, f"{devices.chip}-{name}")
    for path, value in given.items():
      config_path.set_value(path, config, value)
  presets.check_devices(config, len(devices.devices))


def latents_of(
  config: config_lib.TextToImageConfig, height: int | None, width: int | None
) -> tuple[int, int]:
  """Returns the size of latents, of pixels or as the model is for.

  Raises:
    ValueError: pixels that are no whole patches of latents.
  """
  patch = config.model.patch_size
  unit = _COMPRESSION * patch
  sides = []
  for name, side in (("height", height), ("width", width)):
    if side is not None and (side <= 0 or side % unit):
      raise ValueError(f"{name} ({side}) must be a multiple of {unit} pixels.")
    sides.append(
      config.model.sample_size if side is None else side // _COMPRESSION
    )
  return sides[0], sides[1]


def _assemble(
  study: suggest.Study,
  devices: topology.Topology,
  mesh: jax.sharding.Mesh,
  compiled: compilation.Compiled,
) -> report.Plan:
  config, params = study.config, study.program.state.params
  chips = len(devices.devices)
  least = theory.least_bytes(
    params, mesh.shape, config.dtype, config.optim.accumulation
  )
  found, activations = None, []
  if compiled.text is not None:
    found = collectives.collectives(compiled.text, mesh.shape)
    tokens = roofline.tokens_of(config, study.latent_size)
    activations = theory.gathered_activations(
      found,
      params,
      mesh.shape,
      image_elements=tokens * config.model.width // mesh.shape["sequence"],
    )
  times = suggest.step_times(
    study,
    config,
    study.program.state,
    least if found is None else collectives.totals(found),
    mesh.shape,
  )
  candidates = list(suggest.candidates(study, _chip_counts(devices)))
  return report.Plan(
    title=f"training step for {devices}",
    settings=_settings(config, mesh, study.latent_size, chips),
    memory=compiled.memory,
    total=compiled.total,
    on_host=compiled.on_host,
    hbm_bytes=study.chip.hbm_bytes,
    found=found,
    least=least,
    activations=activations,
    step_flops=roofline.step_flops(config, study.latent_size),
    times=times,
    efficiency=study.efficiency,
    prediction=roofline.predict(
      times.step,
      batch_size=config.batch_size,
      chips=chips,
      num_images=study.num_images,
    ),
    num_images=study.num_images,
    chips=chips,
    seconds=compiled.seconds,
    suggested=suggest.cheapest(candidates, study.chip.hbm_bytes),
    versions=topology.versions(),
  )


def _settings(config, mesh, latent_size, chips) -> dict[str, str]:
  sizes = [f"{name}={n}" for name, n in mesh.shape.items() if n > 1]
  return {
    "model": f"{config.model.num_layers} blocks of width {config.model.width}",
    "latents": "x".join(map(str, latent_size)),
    "mesh": " ".join(sizes) or "1",
    "batch_size": f"{config.batch_size} ({config.batch_size / chips:g} a chip)",
    "parts": config.optim.accumulation,
    "remat": config.remat,
    "preset": config.hardware.preset or "none",
    "optimiser": config.optim.name,
    "dtype": config.dtype,
  }


def _chip_counts(devices: topology.Topology) -> list[int]:
  """Returns these chips, and halves of them down to one."""
  chips = len(devices.devices)
  if devices.num_slices > 1:
    return [chips]
  return [
    chips >> n for n in range(chips.bit_length()) if chips % (1 << n) == 0
  ]
