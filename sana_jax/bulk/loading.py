"""Loads a pipeline as flags say, or as an image says that it was."""

import dataclasses
from typing import Any

from absl import logging
from etils import epath

from sana_jax import pipeline as pipeline_lib
from sana_jax.models import tiling, windows
from sana_jax.pipeline import memory, sources
from sana_jax.weights import components, lora, opening


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
  """How a checkpoint becomes a pipeline.

  Attributes:
    components: see `SanaPipeline.from_pretrained`, as `step` and `fp16_clamp`.
    vae_tile: decode in square tiles of so many pixels; None: as memory has it.
    vae_window: likewise in windows, the same up to rounding.
    controlnet: directory, file or published name of one; None: no ControlNet.
    controlnet_wiring: see `SanaPipeline`; None: that of the file's layout.
    lora: directories or files of adapters.
    lora_scale: one for all, or one for each; none: 1.
    offload_text_encoder: see `memory.Policy`.
    fuse_lora: add them to the weights, instead of computing them beside.
  """

  dtype: str = "float32"
  variant: str | None = None
  components: str | None = None
  step: int | None = None
  fp16_clamp: bool | None = None
  vae_tile: int | None = None
  vae_window: int | None = None
  controlnet: str | None = None
  controlnet_wiring: str | None = None
  lora: tuple[str, ...] = ()
  lora_scale: tuple[float, ...] = ()
  fuse_lora: bool = False
  offload_text_encoder: bool | None = None

  def __post_init__(self):
    problems = []
    if self.vae_tile is not None and self.vae_window is not None:
      problems.append(
        "--vae_tile and --vae_window exclude each other; give one"
      )
    if self.controlnet_wiring is not None and self.controlnet is None:
      problems.append("--controlnet_wiring has no effect without --controlnet")
    if self.fuse_lora and not self.lora:
      problems.append("--fuse_lora has no effect without --lora")
    if len(self.lora_scale) not in {0, 1, len(self.lora)}:
      problems.append(
        f"there are {len(self.lora_scale)} --lora_scale for "
        f"{len(self.lora)} --lora; give one for all, or one for each"
      )
    if self.lora_scale and not self.lora:
      problems.append("--lora_scale has no effect without --lora")
    if problems:
      raise ValueError("; ".join(problems) + ".")

  def describe(self) -> dict[str, Any]:
    """Returns dtype, and what else is not as usual, as JSON values."""
    usual = Loading()
    return {"dtype": self.dtype} | {
      field.name: value
      for field in dataclasses.fields(self)
      if (value := getattr(self, field.name)) != getattr(usual, field.name)
    }


def load(
  checkpoint: epath.PathLike, loading: Loading
) -> pipeline_lib.SanaPipeline:
  """Loads a checkpoint and what goes with it.

  Raises:
    FileNotFoundError: something is missing.
    ValueError: something is unreadable, or does not fit.
  """
  pipe = pipeline_lib.SanaPipeline.from_pretrained(
    checkpoint,
    dtype=loading.dtype,
    variant=loading.variant,
    components=loading.components,
    step=loading.step,
    fp16_clamp=loading.fp16_clamp,
  )
  changes = _cut(loading, pipe)
  if loading.offload_text_encoder is not None:
    changes["memory"] = memory.Policy(
      offload_text_encoder=loading.offload_text_encoder
    )
  if loading.controlnet is not None:
    changes |= _load_controlnet(loading, pipe)
  if loading.lora:
    scales = loading.lora_scale or (1.0,)
    if len(scales) == 1:
      scales *= len(loading.lora)
    adapters = [lora.load(path) for path in loading.lora]
    add = lora.fuse if loading.fuse_lora else lora.attach
    changes["transformer"] = add(
      pipe.transformer, list(zip(adapters, scales, strict=True))
    )
  return dataclasses.replace(pipe, **changes) if changes else pipe


def _cut(loading: Loading, pipe: pipeline_lib.SanaPipeline) -> dict[str, Any]:
  """Reads how decoding is cut, and refuses at once what never could be."""
  changes: dict[str, Any] = {}
  makers = {
    "vae_tile": tiling.square,
    "vae_window": lambda side: windows.Windows(window_side=side),
  }
  for name, make in makers.items():
    side = getattr(loading, name)
    if side is None:
      continue
    try:
      changes["tiling"] = make(side)
      changes["tiling"].check_multiples(
        pipe.autoencoder_config.spatial_compression
      )
    except ValueError as error:
      raise ValueError(f"--{name}={side}: {error}") from error
  return changes


def _load_controlnet(
  loading: Loading, pipe: pipeline_lib.SanaPipeline
) -> dict[str, Any]:
  path = sources.resolve_controlnet(loading.controlnet)
  wiring = loading.controlnet_wiring
  if wiring is None:
    # Weights in the original layout were trained in the original wiring.
    layout = opening.open_controlnet(path).layout
    wiring = "original" if layout == "original" else "diffusers"
    logging.info("ControlNet: %s wiring, as its files are", wiring)
  model, config = components.load_controlnet(
    path,
    dtype=loading.dtype,
    fp16_clamp=pipe.transformer.fp16_clamp,
  )
  return {
    "controlnet": model,
    "controlnet_config": config,
    "controlnet_wiring": wiring,
  }
