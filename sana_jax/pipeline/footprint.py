"""Predicts the memory of a pipeline's programs from shapes, without compiling.

A program needs its largest set of arrays that live at the same time. The
candidates can be listed from a config; how many copies a compiler keeps of them
cannot, and is a factor measured for each backend (`_FACTORS`).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from sana_jax import config as config_lib
from sana_jax.models import dc_ae
from sana_jax.models import windows as windows_lib
from sana_jax.pipeline import decoding

_FLOAT32 = 4
# The blended image, its finished form, and what lies between.
_JOINED = 3


class Part(NamedTuple):
  """A model, as far as its memory goes."""

  config: Any
  weights: int  # bytes
  dtype: np.dtype  # of weights and computation


class Models(NamedTuple):
  """The models of a pipeline, and what they run on.

  Attributes:
    platform: "cpu", "gpu" or "tpu".
  """

  text_encoder: Part
  transformer: Part
  autoencoder: Part
  platform: str
  controlnet: Part | None = None


class Work(NamedTuple):
  """What a pipeline is asked for.

  Attributes:
    branches: passes that guidance makes of each image, in one batch.
    token_length: what the text encoder reads of a prompt, its instruction
      included; `text_length` of it reach the transformer.
    latent_size: height and width of what the transformer makes.
    height: of the finished images, as `width`.
    encoded: pictures that are given, and encoded in one go.
    limited: whether guidance is limited to an interval.
  """

  prompts: int
  images: int
  devices: int
  branches: int
  token_length: int
  text_length: int
  latent_size: tuple[int, int]
  height: int
  width: int
  encoded: int = 0
  limited: bool = False

  @property
  def instruction_length(self) -> int:
    """Tokens that are read once, as `text.instruction_ids` has them."""
    if self.token_length <= self.text_length:
      return 0
    # Its first one is also the first of the text that reaches the transformer.
    return self.token_length - self.text_length + 1

  @property
  def prompts_per_device(self) -> int:
    return -(-self.prompts // self.devices)

  @property
  def images_per_device(self) -> int:
    return -(-self.images // self.devices)


class Factors(NamedTuple):
  """What a backend allocates, per byte of the largest live set.

  Attributes:
    layer_copies: how many of the transformer's layers are copied.
    decoder: by bytes per element of the computation.
    recast: copy of the weights in the precision that products are made in,
      as a multiple of them; by bytes per element, too.
    program: bytes of a program itself.
  """

  text_encoder: float
  transformer: float
  layer_copies: int
  decoder: Mapping[int, float]
  recast: Mapping[int, float]
  program: int


# Chosen so that no prediction measured in tests/pipeline/test_memory.py and
# with bench/memory.py is below what XLA allocates (jaxlib 0.10.2). Products of
# bfloat16 matrices are float32 on CPU; those of float32 matrices, and all
# convolutions, are bfloat16 on TPUs. GPUs are not measured: they get what TPUs
# need.
_CPU = Factors(
  text_encoder=1.3,
  transformer=1.15,
  layer_copies=0,
  decoder={2: 1.15, 4: 1.15},
  recast={2: 2.0, 4: 0.0},
  program=2**18,
)
_TPU = Factors(
  text_encoder=0.7,
  transformer=1.25,
  layer_copies=3,
  decoder={2: 2.8, 4: 1.45},
  recast={2: 0.0, 4: 0.5},
  program=2**27,
)
_FACTORS = {"cpu": _CPU, "tpu": _TPU, "gpu": _TPU}


def make_part(config: Any, model: Any) -> Part:
  """Measures a model; its dtype is that of its largest array."""
  largest = max(jax.tree.leaves(model), key=lambda leaf: math.prod(leaf.shape))
  return Part(config, nbytes(model), np.dtype(largest.dtype))


def nbytes(tree: Any) -> int:
  """Sums the bytes of arrays, abstract ones included."""
  return sum(
    math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    for leaf in jax.tree.leaves(tree)
  )


def text_encoder(models: Models, work: Work) -> int:
  """Predicts the bytes beside weights that encoding prompts takes.

  They may have to be read whole, though what their instruction gave is there.
  """
  part, factors = models.text_encoder, _FACTORS[models.platform]
  batch = work.prompts_per_device
  live = text_encoder_live(
    part.config, batch=batch, length=work.token_length, dtype=part.dtype
  )
  states = batch * work.text_length * part.config.hidden_size * _FLOAT32
  return (
    int(factors.text_encoder * live)
    + instruction(part, work.instruction_length)
    + states
    + _recast(part, factors)
    + factors.program
  )


def instruction(part: Part, tokens: int) -> int:
  """Bytes of what a text encoder makes of an instruction.

  It stays on the devices: 22 MB of Gemma-2-2B in bfloat16, which later stages
  have to spare.
  """
  config = part.config
  kept = keys_values(
    config.num_hidden_layers * config.num_key_value_heads * config.head_dim,
    batch=1,
    text_length=tokens,
    dtype=part.dtype,
  )
  return kept + config.hidden_size * _FLOAT32


def transformer(models: Models, work: Work) -> int:
  """Predicts the bytes beside weights that sampling takes, all steps."""
  part, factors = models.transformer, _FACTORS[models.platform]
  config, images = part.config, work.images_per_device
  height, width = work.latent_size
  live = transformer_live(
    config,
    batch=work.branches * images,
    tokens=height * width // config.patch_size**2,
    text_length=work.text_length,
    dtype=part.dtype,
  )
  latents = images * height * width * config.in_channels * _FLOAT32
  residuals = 0
  attending = config.num_layers
  if models.controlnet is not None:
    # And the transformer's first block once more.
    attending += models.controlnet.config.num_layers + 1
    tokens = height * width // config.patch_size**2
    residuals = (
      models.controlnet.config.num_layers
      * (work.branches * images * tokens * config.width)
      * _FLOAT32
    )
  states = images * work.text_length * config.caption_channels * _FLOAT32
  return (
    int(factors.transformer * live)
    # The latents given and returned, and a multistep sampler's memory.
    + 4 * latents
    + work.branches * states
    + keys_values(
      attending * config.width,
      # Steps without guidance have their own.
      batch=(work.branches + work.limited) * images,
      text_length=work.text_length,
      dtype=part.dtype,
    )
    # Of all blocks of the ControlNet, and a copy while they are stacked.
    + 2 * residuals
    + factors.layer_copies * part.weights // config.num_layers
    + _recast(part, factors)
    + factors.program
  )


def keys_values(
  features: int, *, batch: int, text_length: int, dtype: Any
) -> int:
  """Bytes of the keys and values that attention keeps of texts.

  Args:
    features: of the keys of a token, summed over all blocks that attend.
  """
  return 2 * features * batch * text_length * np.dtype(dtype).itemsize


def decoder(models: Models, work: Work, how: decoding.Decoding) -> int:
  """Predicts the bytes beside weights that decoding and blending take."""
  part, factors = models.autoencoder, _FACTORS[models.platform]
  config, images = part.config, work.images_per_device
  factor = config.spatial_compression
  height, width = (factor * side for side in work.latent_size)
  at_once = 1 if how.separate else images
  tiled = how.tiling is not None
  sides = (
    (min(how.tiling.tile_height, height), min(how.tiling.tile_width, width))
    if tiled
    else (height, width)
  )
  whole = 0
  if how.windows is None:
    live = decoder_live(
      config,
      batch=at_once,
      height=sides[0],
      width=sides[1],
      dtype=part.dtype,
    )
  else:
    live, whole = windows_live(
      config, height=height, width=width, dtype=part.dtype, windows=how.windows
    )
  program = (
    int(factors.decoder[part.dtype.itemsize] * live)
    + whole
    + _recast(part, factors)
    + factors.program
  )
  size = config.in_channels * max(height * width, work.height * work.width)
  if not tiled:
    return program + images * size * _FLOAT32
  # All tiles end up on the first device, where they are blended.
  overlap = math.prod(
    tile / stride
    for tile, stride in zip(how.tiling.tile, how.tiling.stride, strict=True)
  )
  tiles = int(work.images * size * overlap * part.dtype.itemsize)
  join = _JOINED * work.images * size * _FLOAT32
  return max(program, join) + tiles


def encoder(models: Models, work: Work, how: decoding.Decoding) -> int:
  """Predicts the bytes beside weights that encoding given pictures takes."""
  part, factors = models.autoencoder, _FACTORS[models.platform]
  config = part.config
  factor = config.spatial_compression
  height, width = (factor * side for side in work.latent_size)
  images = -(-work.encoded // work.devices)
  sides = (height, width)
  if how.tiling is not None:
    sides = (
      min(how.tiling.tile_height, height),
      min(how.tiling.tile_width, width),
    )
  live = encoder_live(
    config,
    batch=1 if how.separate else images,
    height=sides[0],
    width=sides[1],
    dtype=part.dtype,
  )
  return (
    int(factors.decoder[part.dtype.itemsize] * live)
    + _recast(part, factors)
    + factors.program
    # The pictures, and a copy in the autoencoder's range.
    + 2 * images * config.in_channels * height * width * _FLOAT32
  )


def _recast(part: Part, factors: Factors) -> int:
  return int(factors.recast[part.dtype.itemsize] * part.weights)


def text_encoder_live(
  config: config_lib.Gemma2Config, *, batch: int, length: int, dtype: Any
) -> int:
  """Bytes of the largest live set of one block, for all tokens."""
  e = np.dtype(dtype).itemsize
  heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
  stream = config.hidden_size * (2 * _FLOAT32 + e)
  queries = config.head_dim * (heads + 2 * kv_heads)
  attention = queries * (e + _FLOAT32) + heads * length * (2 * _FLOAT32 + e)
  mlp = config.intermediate_size * 3 * e
  return batch * length * (stream + max(attention, mlp))


def transformer_live(
  config: config_lib.SanaConfig,
  *,
  batch: int,
  tokens: int,
  text_length: int,
  dtype: Any,
) -> int:
  """Bytes of the largest live set of one block.

  Args:
    batch: samples in one call of the network, guidance's copies included.
    tokens: patches of an image.
  """
  e = np.dtype(dtype).itemsize
  width = config.width
  stream = width * (2 * _FLOAT32 + e)
  self_attention = 3 * width * (e + _FLOAT32) + width * _FLOAT32
  logits = config.num_cross_attention_heads * text_length * (2 * _FLOAT32 + e)
  cross_attention = width * (e + _FLOAT32) + logits
  hidden = int(config.mlp_ratio * width)
  ffn = 8 * hidden * e  # a product of 2 hidden, activated, padded, filtered
  text = batch * text_length * (config.caption_channels + 3 * width) * _FLOAT32
  per_token = stream + max(self_attention, cross_attention, ffn)
  return batch * tokens * per_token + text


def decoder_live(
  config: config_lib.DCAEConfig,
  *,
  batch: int,
  height: int,
  width: int,
  dtype: Any,
) -> int:
  """Bytes of the largest live set while images or tiles are decoded.

  Args:
    height: of what is decoded at a time, in pixels, as `width`.
  """
  e = np.dtype(dtype).itemsize
  stages = dc_ae.decoder_stages(config)
  moments = [3 * e * config.in_channels]
  for level, stage in enumerate(stages):
    area = 4.0**-level
    if not stage.depth:
      continue
    c = stage.width
    moments.append(area * _block_live(stage, e))
    if level + 1 < len(stages):
      below = stages[level + 1].width
      interpolated = config.upsample_block_type == "interpolate"
      conv = below + c if interpolated else below / 4 + 2 * c
      shortcut = 2 * c
      moments.append(area * e * (conv + shortcut))
  if not stages[0].depth:
    c = stages[1].width
    moments.append(0.25 * e * (2 * c + 4 * config.in_channels))
  return int(batch * height * width * max(moments))


def windows_live(
  config: config_lib.DCAEConfig,
  *,
  height: int,
  width: int,
  dtype: Any,
  windows: windows_lib.Windows,
) -> tuple[int, int]:
  """Bytes of the largest live set of a window, and of what is kept whole.

  Args:
    height: of the image, in pixels, as `width`.
  """
  e = np.dtype(dtype).itemsize
  stages = dc_ae.decoder_stages(config)
  outer = windows_lib.outer_levels(stages, config.upsample_block_type)
  side = windows.window_side // outer.scale
  largest = outer.scale * (side + 2 * outer.halo)
  live = decoder_live(
    config,
    batch=1,
    height=min(height, largest),
    width=min(width, largest),
    dtype=dtype,
  )
  features = 0
  for level, stage in enumerate(stages):
    if level < outer.count or not stage.depth:
      continue
    rows, columns = height >> level, width >> level
    features = max(features, rows * columns * stage.width * e)
    # Of the blocks, those with attention reach furthest.
    reach = max(stage.scales, default=0) // 2 + 1
    rows, columns = (min(n, side + 2 * reach) for n in (rows, columns))
    live = max(live, int(rows * columns * _block_live(stage, e)))
  # Features before and after a block, and the image that windows fill.
  return live, 2 * features + height * width * config.in_channels * e


def encoder_live(
  config: config_lib.DCAEConfig,
  *,
  batch: int,
  height: int,
  width: int,
  dtype: Any,
) -> int:
  """Bytes of the largest live set while images or tiles are encoded.

  Args:
    height: of what is encoded at a time, in pixels, as `width`.
  """
  e = np.dtype(dtype).itemsize
  stages = dc_ae.encoder_stages(config)
  first = next(i for i, stage in enumerate(stages) if stage.depth)
  moments = [
    4.0**-first * e * 2 * stages[first].width + 2 * e * config.in_channels
  ]
  for level, stage in enumerate(stages):
    if not stage.depth:
      continue
    moments.append(4.0**-level * _block_live(stage, e))
    if level + 1 < len(stages):
      # The stage's output, its shortcut, and what becomes of both.
      below = stages[level + 1].width
      moments.append(4.0**-level * e * (2 * stage.width + below / 2))
  return int(batch * height * width * max(moments))


def _block_live(stage: dc_ae.StageSpec, e: int) -> float:
  """Bytes a pixel of the largest live set of one block; e an element."""
  c = stage.width
  if stage.block == "ResBlock":
    return c * (3 * e + _FLOAT32)
  inner = 3 * c * (1 + len(stage.scales))
  attention = inner * (e + _FLOAT32)
  ffn = 32 * c * e
  return c * 2 * e + max(attention, ffn)
