"""Recognises published architectures by the shapes of original files."""

import math
import re

from sana_jax import config as config_lib
from sana_jax.weights import files


def infer_transformer_config(
  tensors: files.Tensors, *, source: str = "checkpoint"
) -> config_lib.SanaConfig:
  """Recognises a published architecture by the shapes of an original file.

  Raises:
    ValueError: not one of the published widths, or no positional embedding
      that would tell the training resolution.
  """
  presets = {
    preset.width: preset
    for preset in (config_lib.sana_600m(), config_lib.sana_1600m())
  }
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  width = shapes.get("x_embedder.proj.weight", (None,))[0]
  grid = shapes.get("pos_embed", (0, 0))[1]
  side = math.isqrt(grid)
  if width not in presets or not grid or side**2 != grid:
    raise ValueError(
      f"The architecture of {source} cannot be told from its shapes (width "
      f"{width}, pos_embed {shapes.get('pos_embed')}); pass config=..., or put "
      "a config.json beside it."
    )
  config = presets[width]
  blocks = {re.match(r"blocks\.(\d+)\.", name) for name in shapes} - {None}
  config.num_layers = len({match[1] for match in blocks})
  config.sample_size = side
  # Only the 2K and 4K models use their positional embedding.
  config.interpolation_scale = {64: 1.0, 128: 2.0}.get(side)
  if "blocks.0.attn.q_norm.weight" in shapes:
    config.qk_norm = "rms_norm_across_heads"
  config.guidance_embeds = "cfg_embedder.mlp.0.weight" in shapes
  return config


def infer_controlnet_config(
  tensors: files.Tensors, *, source: str = "checkpoint"
) -> config_lib.SanaControlNetConfig:
  """Recognises a published architecture by the shapes of an original file.

  Raises:
    ValueError: not one of the published widths.
  """
  presets = {
    preset.width: preset
    for preset in (config_lib.sana_600m(), config_lib.sana_1600m())
  }
  patches = tensors.get("x_embedder.proj.weight")
  width = None if patches is None else patches.shape[0]
  if width not in presets:
    raise ValueError(
      f"The architecture of the ControlNet in {source} cannot be told from its "
      f"width {width}, expected one of {sorted(presets)}; pass config=..."
    )
  config = config_lib.from_dict(
    config_lib.SanaControlNetConfig, presets[width].to_dict()
  )
  blocks = {re.match(r"controlnet\.(\d+)\.", name) for name in tensors} - {None}
  config.num_layers = len({match[1] for match in blocks})
  return config
