"""The block of a SanaTransformer and of its ControlNet."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sana_jax import config as config_lib
from sana_jax.nn import attention, layers, mix_ffn, stack


def modulate(
  x: Float[Array, "b h w d"],
  shift: Float[Array, "b 1 1 d"],
  scale: Float[Array, "b 1 1 d"],
) -> Float[Array, "b h w d"]:
  """Computes x (1 + scale) + shift."""
  return x * (1 + scale) + shift


class SanaBlock(nnx.Module):
  """Linear self-attention, cross-attention to the text, Mix-FFN.

  The first and the last are normalised, modulated and gated (adaLN-single);
  the cross-attention reads the residual stream as it is.

  Source: SANA, arXiv:2410.10629, section 2.2 and figure 5.
  """

  def __init__(
    self,
    features: int,
    *,
    head_dim: int,
    cross_head_dim: int,
    mlp_ratio: float,
    attention_bias: bool,
    qk_norm: bool,
    norm_affine: bool,
    norm_eps: float,
    fp16_clamp: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.scale_shift_table = scale_shift_table(6, features, param_dtype, rngs)
    self.norm1 = layers.LayerNorm(features, eps=norm_eps)
    self.self_attention = attention.LinearSelfAttention(
      features,
      head_dim=head_dim,
      use_bias=attention_bias,
      qk_norm=qk_norm,
      fp16_clamp=fp16_clamp,
      **common,
    )
    self.cross_attention = attention.CrossAttention(
      features, head_dim=cross_head_dim, qk_norm=qk_norm, **common
    )
    # Only this norm follows `norm_elementwise_affine` in the checkpoints.
    self.norm2 = layers.LayerNorm(
      features, eps=norm_eps, affine=norm_affine, param_dtype=param_dtype
    )
    self.ffn = mix_ffn.MixFFN(features, int(mlp_ratio * features), **common)

  def __call__(
    self,
    x: Float[Array, "b h w d"],
    modulation: Float[Array, "b 6 d"],
    text: Float[Array, "b l d"] | attention.KeysValues,
    text_mask: Bool[Array, "b l"] | None,
    identity_attention: Bool[Array, " b"] | None = None,
  ) -> Float[Array, "b h w d"]:
    shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(modulation)
    x = x + gate1 * self.attend_image(
      modulate(self.norm1(x), shift1, scale1), identity_attention
    )
    x = x + self.attend_text(x, text, text_mask)
    return x + gate2 * self.ffn(modulate(self.norm2(x), shift2, scale2))

  def modulation(
    self, modulation: Float[Array, "b 6 d"]
  ) -> tuple[Float[Array, "b 1 1 d"], ...]:
    """Shift, scale and gate of the self-attention, then of the Mix-FFN."""
    return rows_of(self.scale_shift_table, modulation)

  def attend_image(
    self, x: Float[Array, "b h w d"], identity: Bool[Array, " b"] | None = None
  ) -> Float[Array, "b h w d"]:
    return self.self_attention(x, identity)

  def attend_text(
    self,
    x: Float[Array, "b h w d"],
    text: Float[Array, "b l d"] | attention.KeysValues,
    text_mask: Bool[Array, "b l"] | None,
  ) -> Float[Array, "b h w d"]:
    return self.cross_attention(x, text, text_mask)


def block_builder(
  config: config_lib.SanaBlocksConfig,
  *,
  qk_norm: bool,
  fp16_clamp: bool,
  dtype: DTypeLike,
  param_dtype: DTypeLike,
) -> Callable[[jax.Array], SanaBlock]:
  """Returns a function from a random key to a fresh block."""

  def make_block(key: jax.Array) -> SanaBlock:
    return SanaBlock(
      config.width,
      head_dim=config.attention_head_dim,
      cross_head_dim=config.cross_attention_head_dim,
      mlp_ratio=config.mlp_ratio,
      attention_bias=config.attention_bias,
      qk_norm=qk_norm,
      norm_affine=config.norm_elementwise_affine,
      norm_eps=config.norm_eps,
      fp16_clamp=fp16_clamp,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=nnx.Rngs(key),
    )

  return make_block


def encode_for_blocks(
  blocks: SanaBlock, text: Float[Array, "b l d"], *, scan: bool
) -> attention.KeysValues:
  """Returns keys and values for the cross-attention of every block.

  Args:
    blocks: stacked.
    text: in the width of the blocks.
    scan: as in `stack.run_blocks`.
  """
  return stack.collect_blocks(
    lambda block, carry: (carry, block.cross_attention.encode(text)),
    None,
    blocks,
    scan=scan,
    remat="none",
  )[1]


def scale_shift_table(
  rows: int, features: int, param_dtype: DTypeLike, rngs: nnx.Rngs
) -> nnx.Param:
  """Draws what modulations are added to."""
  init = nnx.initializers.normal(features**-0.5)
  return nnx.Param(init(rngs.params(), (rows, features), param_dtype))


def rows_of(
  table: nnx.Param, embedded: Float[Array, "b #rows d"]
) -> tuple[Float[Array, "b 1 1 d"], ...]:
  """Returns the rows of a table plus an embedding, in float32."""
  # float32: gates are small, and bfloat16 would round their updates away.
  total = table[...].astype(jnp.float32)[None] + embedded
  return tuple(total[:, i, None, None] for i in range(total.shape[1]))
