"""Blocks of convolutional autoencoders: residual, and EfficientViT's."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax.nn import layers, mix_ffn, vision
from sana_jax.ops import gated_conv as gated_conv_op
from sana_jax.ops import linear_attention as linear_attention_op

NORM_EPS = 1e-5
_FFN_EXPANSION = 4
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
  "relu": jax.nn.relu,
  "mish": jax.nn.mish,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}
NORMS = ("rms_norm", "batch_norm")


def make_norm(
  kind: str, features: int, param_dtype: DTypeLike
) -> layers.RMSNorm | vision.BatchNorm:
  """Builds one of `NORMS`, with scale and bias."""
  if kind == "batch_norm":
    return vision.BatchNorm(features, eps=NORM_EPS, param_dtype=param_dtype)
  return layers.RMSNorm(
    features, eps=NORM_EPS, use_bias=True, param_dtype=param_dtype
  )


class ResBlock(nnx.Module):
  """x + norm(conv2(activation(conv1(x)))), two 3x3 convolutions.

  Attributes:
    reach: pixels to each side that one depends on.
  """

  reach = 2 * layers.Conv.reach

  def __init__(
    self,
    features: int,
    *,
    norm: str,
    activation: str,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.activation = ACTIVATIONS[activation]
    self.conv1 = layers.Conv(features, features, **common)
    self.conv2 = layers.Conv(features, features, use_bias=False, **common)
    self.norm = make_norm(norm, features, param_dtype)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return x + self.norm(self.conv2(self.activation(self.conv1(x))))


class ScaleBranch(nnx.Module):
  """Aggregates queries, keys and values over a neighbourhood.

  A depthwise convolution over space, then one small matrix per group of
  head_dim channels.
  """

  def __init__(
    self,
    features: int,
    *,
    head_dim: int,
    kernel_size: int,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    self.depth_kernel = nnx.Param(
      layers.torch_default_init(kernel_size**2)(
        rngs.params(), (kernel_size, kernel_size, features), param_dtype
      )
    )
    self.point_kernel = nnx.Param(
      layers.torch_default_init(head_dim)(
        rngs.params(), (features // head_dim, head_dim, head_dim), param_dtype
      )
    )

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    point = self.point_kernel[...].astype(self.dtype)
    y = gated_conv_op.depthwise_conv(
      x, self.depth_kernel[...].astype(self.dtype)
    )
    groups = y.reshape(*y.shape[:3], *point.shape[:2])
    return jnp.einsum("bhwgi,gio->bhwgo", groups, point).reshape(x.shape)


class MultiScaleLinearAttention(nnx.Module):
  """ReLU linear attention whose heads see tokens at several scales.

  Each run of 3 * head_dim channels of [qkv, branch(qkv), ...] is the query, key
  and value of one head. The first half of the heads hence reads plain tokens,
  the others (one share per entry of `scales`) neighbourhoods of them.

  Attributes:
    reach: pixels to each side that a query, key or value is made of.

  Source: Cai et al., EfficientViT, arXiv:2205.14756, section 3.1.
  """

  def __init__(
    self,
    features: int,
    *,
    head_dim: int,
    scales: Sequence[int],
    norm: str,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.head_dim = head_dim
    self.reach = max(scales, default=1) // 2
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    inner = features // head_dim * head_dim
    self.qkv = layers.Linear(
      features,
      3 * inner,
      use_bias=False,
      kernel_init=layers.torch_default_init(features),
      **common,
    )
    self.branches = nnx.List(
      [
        ScaleBranch(3 * inner, head_dim=head_dim, kernel_size=k, **common)
        for k in scales
      ]
    )
    joined = inner * (1 + len(scales))
    self.out = layers.Linear(
      joined,
      features,
      use_bias=False,
      kernel_init=layers.torch_default_init(joined),
      axes=(None, "embed"),
      **common,
    )
    self.norm = make_norm(norm, features, param_dtype)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    tokens = (_tokens(part) for part in self.queries_keys_values(x))
    return self._close(linear_attention_op.relu_linear_attention(*tokens), x)

  def attend(
    self, x: Float[Array, "b h w c"], state: linear_attention_op.State
  ) -> Float[Array, "b h w c"]:
    """Computes `self(x)` with the state of another `x`, such as a larger one.

    Args:
      state: `linear_attention.state` of its keys and values.
    """
    queries, _, _ = self.queries_keys_values(x)
    y = linear_attention_op.apply(
      _tokens(queries), state, eps=linear_attention_op.EPS, dtype=queries.dtype
    )
    return self._close(y, x)

  def queries_keys_values(
    self, x: Float[Array, "b h w c"]
  ) -> tuple[Float[Array, "b h w heads head_dim"], ...]:
    qkv = self.qkv(x)
    qkv = jnp.concatenate(
      [qkv, *(branch(qkv) for branch in self.branches)], axis=-1
    )
    heads = qkv.reshape(*x.shape[:3], -1, 3 * self.head_dim)
    return tuple(jnp.split(heads, 3, axis=-1))

  def _close(
    self, y: Float[Array, "b n heads head_dim"], x: Float[Array, "b h w c"]
  ) -> Float[Array, "b h w c"]:
    return self.norm(self.out(y.reshape(*x.shape[:3], -1)))


class EfficientViTBlock(nnx.Module):
  """x + attention(x), then x + norm(ffn(x)).

  Norms close the residual branches; there are none before them.

  Attributes:
    feed_forward_reach: pixels to each side that one depends on there.
  """

  feed_forward_reach = 1

  def __init__(
    self,
    features: int,
    *,
    head_dim: int,
    scales: Sequence[int],
    norm: str,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.attention = MultiScaleLinearAttention(
      features, head_dim=head_dim, scales=scales, norm=norm, **common
    )
    self.ffn = mix_ffn.MixFFN(features, _FFN_EXPANSION * features, **common)
    # Whatever the stage's norm: published models have RMS norm here.
    self.norm = make_norm("rms_norm", features, param_dtype)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    return self.feed_forward(x + self.attention(x))

  def feed_forward(self, x: Float[Array, "b h w c"]) -> Array:
    """The second half of the block."""
    return x + self.norm(self.ffn(x))


def _tokens(x: Float[Array, "b h w heads d"]) -> Float[Array, "b n heads d"]:
  return x.reshape(x.shape[0], -1, *x.shape[3:])
