"""Loads a pipeline as flags say, or as an image says that it was."""

import dataclasses
from typing import Any

from etils import epath

from sana_jax import pipeline as pipeline_lib
from sana_jax.models import tiling
from sana_jax.weights import components, lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loading:
  """How a checkpoint becomes a pipeline.

  Attributes:
    vae_tile: decode in square tiles of so many pixels; None: whole.
    controlnet: directory or file of one; None: no ControlNet.
    controlnet_wiring: see `SanaPipeline`; None: that of diffusers.
    lora: directories or files of adapters.
    lora_scale: one for all, or one for each; none: 1.
    fuse_lora: add them to the weights, instead of computing them beside.
  """

  dtype: str = "float32"
  variant: str | None = None
  vae_tile: int | None = None
  controlnet: str | None = None
  controlnet_wiring: str | None = None
  lora: tuple[str, ...] = ()
  lora_scale: tuple[float, ...] = ()
  fuse_lora: bool = False

  def __post_init__(self):
    problems = []
    if self.controlnet_wiring is not None and self.controlnet is None:
      problems.append("controlnet_wiring has no effect without controlnet")
    if self.fuse_lora and not self.lora:
      problems.append("fuse_lora has no effect without lora")
    if len(self.lora_scale) not in {0, 1, len(self.lora)}:
      problems.append(
        f"there are {len(self.lora_scale)} lora_scale for {len(self.lora)} "
        "lora; give one for all, or one for each"
      )
    if self.lora_scale and not self.lora:
      problems.append("lora_scale has no effect without lora")
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
    checkpoint, dtype=loading.dtype, variant=loading.variant
  )
  changes: dict[str, Any] = {}
  if loading.vae_tile is not None:
    changes["tiling"] = square_tiles(loading.vae_tile)
  if loading.controlnet is not None:
    model, config = components.load_controlnet(
      loading.controlnet, dtype=loading.dtype
    )
    changes |= {"controlnet": model, "controlnet_config": config}
  if loading.controlnet_wiring is not None:
    changes["controlnet_wiring"] = loading.controlnet_wiring
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


def square_tiles(side: int) -> tiling.Tiling:
  """Returns tiles that overlap by an eighth, as published pipelines do."""
  stride = side * 7 // 8
  return tiling.Tiling(
    tile_height=side,
    tile_width=side,
    stride_height=stride,
    stride_width=stride,
  )
