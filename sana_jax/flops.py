"""Floating-point operations of a transformer: what training an image costs.

Products of matrices and convolutions are counted, a multiplication and an
addition as two; norms, activations and the optimiser are a few per cent more.
"""

import math

from sana_jax import config as config_lib

# Sizes of the time embedding; see `nn/embeddings.py`.
_FREQUENCIES = 256
_MODULATIONS = 6
_KERNEL = 3 * 3


def forward(
  config: config_lib.SanaConfig,
  height: int,
  width: int,
  *,
  compression: int = 32,
  text_length: int = 300,
) -> int:
  """Counts the operations of one evaluation, for one image.

  Args:
    height: of the image, in pixels, as `width`.
    compression: pixels per latent.
    text_length: text states, padding included.
  """
  tokens = math.prod(
    side // compression // config.patch_size for side in (height, width)
  )
  patch = config.patch_size**2
  inner = config.width
  embeddings = (
    tokens * patch * (config.in_channels + (config.out_channels or 0)) * inner
    + text_length * (config.caption_channels + inner) * inner
    + (_FREQUENCIES + inner + _MODULATIONS * inner) * inner
  )
  block = _block(config, tokens, text_length)
  return 2 * (embeddings + config.num_layers * block)


def training(forward_flops: int, *, remat: str = "none") -> int:
  """Counts the operations of a training step, for one image.

  The backward pass has two products for each of the forward pass; "full"
  rematerialisation evaluates all blocks once more, and so does "offload".
  """
  return (4 if remat in ("full", "offload") else 3) * forward_flops


def _block(config: config_lib.SanaConfig, tokens: int, text_length: int) -> int:
  """Counts the multiplications of one block."""
  inner = config.width
  hidden = int(config.mlp_ratio * inner)
  # Projections; linear attention's two products with a head of one row more,
  # which is the normaliser.
  self_attention = (
    tokens * inner * (4 * inner + 2 * (config.attention_head_dim + 1))
  )
  cross_attention = (
    2 * inner * inner * (tokens + text_length)
    + 2 * tokens * text_length * inner
  )
  feed_forward = tokens * hidden * (2 * inner + 2 * _KERNEL + inner)
  return self_attention + cross_attention + feed_forward
