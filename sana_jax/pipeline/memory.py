"""Plans how a pipeline keeps within the memory of its devices.

Before anything runs, `plan` predicts what every stage needs (`footprint.py`)
and picks the least intrusive way of running that fits: whole images, one image
at a time or windows; then these with the text encoder on the host; tiles last.
"""

import dataclasses
import os
import pathlib
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from sana_jax import notices, text
from sana_jax.models import tiling as tiling_lib
from sana_jax.models import windows as windows_lib
from sana_jax.pipeline import decoding, footprint, options, sizes

if typing.TYPE_CHECKING:
  from sana_jax.pipeline.text_to_image import SanaPipeline

STAGES = ("text encoder", "transformer", "decoder")
# Of calls that are given pictures.
_WITH_ENCODER = ("text encoder", "encoder", "transformer", "decoder")
_GIB = 2**30
# Of `Policy.available_bytes`, where nobody knows: all fits.
UNKNOWN = sys.maxsize
# What images may be cut into.
Cut = tiling_lib.Tiling | windows_lib.Windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """What a pipeline may do on its own to fit into memory.

  Args:
    window_sides: of windows, in pixels, to decode in when whole images do not
      fit, best first: of the smaller there are more halos to compute. Images
      are the same, up to rounding. Empty: never.
    tile_sides: square tiles, in pixels, to decode in when windows do not fit,
      or pictures that are given have to be encoded in tiles, even with the text
      encoder on the host; best first, overlaps are an eighth. Tiles leave faint
      seams, so that the choice, which depends on the free memory, is warned of.
      Empty: never.
    offload_text_encoder: keep it on the host except while it encodes. None:
      when images without seams, or any, do not fit otherwise.
    available_bytes: what models and programs may take on each device. None:
      what the device reports as free, and what the models occupy already.
      `UNKNOWN`: all fits.

  Raises:
    ValueError: `available_bytes` is not positive.
  """

  window_sides: tuple[int, ...] = (2048, 1024, 512)
  tile_sides: tuple[int, ...] = (2048, 1024, 512)
  offload_text_encoder: bool | None = None
  available_bytes: int | None = None

  def __post_init__(self):
    if self.available_bytes is not None and self.available_bytes < 1:
      raise ValueError(
        f"memory.available_bytes must be positive, got {self.available_bytes}."
      )


class Need(NamedTuple):
  """What a stage occupies on one device, in bytes.

  Attributes:
    weights: of all models that are on the device meanwhile.
    working: inputs, temporaries, outputs and the program.
  """

  weights: int
  working: int

  @property
  def total(self) -> int:
    return self.weights + self.working


class Plan(NamedTuple):
  """How to run, and why.

  Attributes:
    decoding: whole images, windows or tiles.
    offload_text_encoder: whether it leaves the devices once it has encoded.
    needs: by stage.
    available: bytes on each device for all of it; None: unknown.
    reason: one line.
    notable: whether tiles were chosen that the user did not ask for.
  """

  decoding: decoding.Decoding
  offload_text_encoder: bool
  needs: Mapping[str, Need]
  available: int | None
  reason: str
  notable: bool

  @property
  def peak(self) -> int:
    return max(need.total for need in self.needs.values())


def plan(
  models: footprint.Models,
  work: footprint.Work,
  *,
  policy: Policy,
  tiling: Cut | None,
  available: int | None,
  stages: Sequence[str] = STAGES,
) -> Plan:
  """Picks the first way of running that fits.

  In this order: whole images, one image at a time, windows from the largest
  on; the same with the text encoder on the host; tiles from the largest on;
  the same with the text encoder on the host.

  Args:
    tiling: the user's choice; None: any.
    available: bytes on each device; None: unknown, so that all fits.
    stages: those that are to run.

  Raises:
    ValueError: nothing fits, or a tiling that cannot be or has no effect.
  """
  if tiling is not None:
    factor = models.autoencoder.config.spatial_compression
    check_tiling(tiling, work.latent_size, factor)
  tried: list[tuple[_Way, dict[str, Need]]] = []
  for way in _ways(models, work, policy, tiling):
    needs = {
      stage: need
      for stage, need in _needs(models, work, way).items()
      if stage in stages
    }
    tried.append((way, needs))
    if available is None or _peak(needs) <= available:
      return Plan(
        way.decoding,
        way.offload,
        needs,
        available,
        _reason(work, tried, available),
        notable=tiling is None and way.decoding.tiling is not None,
      )
  needs = min((needs for _, needs in tried), key=_peak)
  raise ValueError(_refusal(models, work, needs, available))


def plan_call(
  pipeline: "SanaPipeline",
  *,
  num_prompts: int,
  num_images: int,
  settings: options.GenerationConfig,
  size: sizes.ImageSize,
  num_encoded: int = 0,
) -> Plan:
  """Plans a call of a pipeline; warns of tiles, which change the images.

  Args:
    num_images: of all prompts.
    num_encoded: pictures that are given.

  Raises:
    ValueError: as `plan` does.
  """
  token_ids, _ = text.tokenize_prompts(
    pipeline.tokenizer,
    ["a"],
    complex_human_instruction=settings.complex_human_instruction,
    max_sequence_length=settings.max_sequence_length,
  )
  guided = options.is_guided(settings, is_sprint=pipeline.is_sprint)
  perturbed = settings.pag_scale > 0
  work = footprint.Work(
    prompts=num_prompts,
    images=num_images,
    devices=len(pipeline.used_devices),
    branches=1 + guided + perturbed,
    token_length=token_ids.shape[1],
    text_length=settings.max_sequence_length,
    latent_size=size.grid,
    height=size.height,
    width=size.width,
    encoded=num_encoded,
    limited=settings.guidance_interval is not None,
  )
  stages = _WITH_ENCODER if num_encoded else STAGES
  return _plan_pipeline(pipeline, work, stages)


def plan_decoding(
  pipeline: "SanaPipeline", num_images: int, size: sizes.ImageSize
) -> Plan:
  """Plans the decoder of a pipeline alone; otherwise as `plan_call`."""
  work = footprint.Work(
    prompts=0,
    images=num_images,
    devices=len(pipeline.used_devices),
    branches=1,
    token_length=0,
    text_length=0,
    latent_size=size.grid,
    height=size.height,
    width=size.width,
  )
  return _plan_pipeline(pipeline, work, ("decoder",))


def _plan_pipeline(pipeline, work, stages: Sequence[str]) -> Plan:
  parts = (
    (pipeline.text_encoder_config, pipeline.text_encoder),
    (pipeline.transformer_config, pipeline.transformer),
    (pipeline.autoencoder_config, pipeline.autoencoder),
    (pipeline.controlnet_config, pipeline.controlnet),
  )
  devices = pipeline.used_devices
  available = pipeline.memory.available_bytes
  if available is None:
    available = available_bytes(devices, [model for _, model in parts])
  elif available == UNKNOWN:
    available = None
  *models, controlnet = (
    None if model is None else footprint.make_part(config, model)
    for config, model in parts
  )
  chosen = plan(
    footprint.Models(*models, devices[0].platform, controlnet),
    work,
    policy=pipeline.memory,
    tiling=pipeline.tiling,
    available=available,
    stages=stages,
  )
  if chosen.notable:
    notices.warn(f"Seams may show faintly. {chosen.reason}", stacklevel=4)
  return chosen


def check_tiling(
  tiling: Cut, latent_size: tuple[int, int], factor: int
) -> None:
  """Refuses what cannot be, or is as large as the image.

  Args:
    latent_size: height and width.
    factor: the autoencoder's spatial compression.

  Raises:
    ValueError: names both sizes.
  """
  tiling.check_multiples(factor)
  height, width = (factor * side for side in latent_size)
  if tiling.covers(height, width):
    raise ValueError(
      f"tiling: {tiling} have no effect on images decoded at {height}x{width}; "
      "take smaller ones, or None."
    )


def available_bytes(
  devices: Sequence[jax.Device], models: Sequence[Any]
) -> int | None:
  """Measures what a pipeline may occupy on each of its devices.

  That is what is free, plus what the models on the devices occupy. The devices
  of a CPU share the memory of the host. None: the backend does not tell.
  """
  own = sum(
    leaf.nbytes
    for leaf in jax.tree.leaves(list(models))
    if isinstance(leaf, jax.Array)
  )
  if devices[0].platform == "cpu":
    return host_bytes() // len(devices) + own
  free = []
  for device in devices:
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
      return None
    free.append(stats["bytes_limit"] - stats["bytes_in_use"])
  return min(free) + own


def host_bytes() -> int:
  """Returns the memory that programs on this host may still take."""
  meminfo = pathlib.Path("/proc/meminfo")
  if meminfo.is_file():
    for line in meminfo.read_text().splitlines():
      name, _, value = line.partition(":")
      if name == "MemAvailable":
        return int(value.split()[0]) * 1024
  return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _Way(NamedTuple):
  decoding: decoding.Decoding
  offload: bool


def _ways(models, work, policy, tiling) -> Iterator[_Way]:
  offload = policy.offload_text_encoder
  # On CPU, host and device memory are the same.
  choices = (False, True) if models.platform != "cpu" else (False,)
  for decodings in _decodings(models, work, policy, tiling):
    for choice in choices if offload is None else (offload,):
      for how in decodings:
        yield _Way(how, choice)


def _decodings(
  models, work, policy, tiling
) -> tuple[list[decoding.Decoding], ...]:
  """Lists those that leave no seams, then the others; or the one prescribed."""
  if tiling is not None:
    return ([_cut(tiling)],)
  windows = [windows_lib.Windows(window_side=s) for s in policy.window_sides]
  tiles = [tiling_lib.square(side) for side in policy.tile_sides]
  factor = models.autoencoder.config.spatial_compression
  for candidate in (*windows, *tiles):
    candidate.check_multiples(factor)
  whole = [decoding.Decoding()]
  if work.images_per_device > 1:
    whole.append(decoding.Decoding(one_at_a_time=True))
  size = [factor * side for side in work.latent_size]
  in_windows, in_tiles = (
    [_cut(candidate) for candidate in cuts if not candidate.covers(*size)]
    for cuts in (windows, tiles)
  )
  return [*whole, *in_windows], in_tiles


def _cut(into: Cut) -> decoding.Decoding:
  if isinstance(into, windows_lib.Windows):
    return decoding.Decoding(windows=into)
  return decoding.Decoding(into)


def _needs(models, work, way: _Way) -> dict[str, Need]:
  weights = {
    "text encoder": models.text_encoder.weights,
    "transformer": models.transformer.weights,
    "decoder": models.autoencoder.weights,
    "encoder": 0,  # the same model
    "controlnet": models.controlnet.weights if models.controlnet else 0,
  }
  working = {
    "text encoder": footprint.text_encoder(models, work),
    "encoder": footprint.encoder(models, work, way.decoding),
    "transformer": footprint.transformer(models, work),
    "decoder": footprint.decoder(models, work, way.decoding),
  }
  needs = {}
  for stage in _WITH_ENCODER:
    present = sum(
      size
      for name, size in weights.items()
      if name == stage or name != "text encoder" or not way.offload
    )
    needs[stage] = Need(present, working[stage])
  return needs


def _peak(needs: Mapping[str, Need]) -> int:
  return max(need.total for need in needs.values())


def _reason(work, tried, available: int | None) -> str:
  way, needs = tried[-1]
  parts = []
  if way.decoding.cut is not None:
    parts.append(f"in {way.decoding.cut}")
  elif way.decoding.one_at_a_time:
    parts.append("one image at a time")
  else:
    parts.append("whole images")
  if way.offload:
    parts.append("the text encoder on the host")
  stage = max(needs, key=lambda name: needs[name].total)
  have = "an unknown amount" if available is None else _gib(available)
  text = (
    f"{work.height}x{work.width}: {', '.join(parts)}; the {stage} needs most, "
    f"{_gib(needs[stage].total)} of {have}"
  )
  if len(tried) > 1:
    first = tried[0][1]
    worst = max(first, key=lambda name: first[name].total)
    text += f" (otherwise the {worst}, {_gib(first[worst].total)})"
  return text + "."


def _refusal(models, work, needs, available: int) -> str:
  stage = max(needs, key=lambda name: needs[name].total)
  need = needs[stage]
  weights = {
    "text encoder": models.text_encoder.weights,
    "transformer": models.transformer.weights,
    "autoencoder": models.autoencoder.weights,
  }
  if models.controlnet is not None:
    weights["ControlNet"] = models.controlnet.weights
  listed = ", ".join(f"{name} {_gib(size)}" for name, size in weights.items())
  return (
    f"{work.images_per_device} image(s) of {work.height}x{work.width} per "
    f"device do not fit: the {stage} needs {_gib(need.total)}, "
    f"{_gib(available)} are available on each device. It needs "
    f"{_gib(need.weights)} for weights and {_gib(need.working)} to work with; "
    f"the models have {listed}. Choose a smaller height and width, "
    "dtype=bfloat16, or a smaller batch or more devices."
  )


def _gib(size: int) -> str:
  if size < 0.1 * _GIB:
    return f"{size / 2**20:.1f} MiB"
  return f"{size / _GIB:.1f} GiB"
