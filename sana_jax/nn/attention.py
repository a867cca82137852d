"""The two attentions of SANA: linear among patches, softmax to the text."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sana_jax import sharding
from sana_jax.nn import layers
from sana_jax.ops import attention as attention_op
from sana_jax.ops import linear_attention as linear_attention_op

QK_NORM_EPS = 1e-5
# The largest float16.
FP16_MAX = 65504.0


class LinearSelfAttention(nnx.Module):
  """ReLU linear attention among all patches of an image.

  With `qk_norm`, queries and keys are RMS-normalised over the full width,
  before they are split into heads. `qkv` is one product: on the last axis all
  queries, then all keys, then all values.

  Args:
    fp16_clamp: limits the result to what float16 can hold. Weights trained in
      float16 were trained with that limit, and go astray without it.

  Source of the limit: `SanaLinearAttnProcessor2_0` of diffusers and the
  self-attention of the original release; neither limits anything else.
  """

  def __init__(
    self,
    features: int,
    *,
    head_dim: int,
    use_bias: bool,
    qk_norm: bool,
    fp16_clamp: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.head_dim = head_dim
    self.fp16_clamp = fp16_clamp
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.qkv = layers.Linear(
      features, 3 * features, use_bias=use_bias, **common
    )
    self.norm_q = _qk_norm(features, param_dtype) if qk_norm else None
    self.norm_k = _qk_norm(features, param_dtype) if qk_norm else None
    self.out = layers.Linear(
      features, features, axes=("heads", "embed"), **common
    )

  def __call__(
    self, x: Float[Array, "b *n d"], identity: Bool[Array, " b"] | None = None
  ) -> Float[Array, "b *n d"]:
    """Attends.

    Args:
      x: patches, their rows and columns apart or not.
      identity: where True, every patch attends to itself alone: the perturbed
        branch of perturbed-attention guidance.
    """
    q, k, v = self.qkv.split(x, 3, axis="heads")
    if self.norm_q is not None:
      q, k = self.norm_q(q), self.norm_k(k)
    q, k, v = (_split_heads(y, self.head_dim, "rows") for y in (q, k, v))
    y = linear_attention_op.relu_linear_attention(q, k, v)
    if identity is not None:
      y = jnp.where(identity[:, None, None, None], v.astype(y.dtype), y)
    return self.project(y.reshape(x.shape))

  def project(self, y: Float[Array, "b *n d"]) -> Float[Array, "b *n d"]:
    """Maps what was attended to the output, limited if so wished."""
    y = self.out(y)
    if not self.fp16_clamp:
      return y
    # float32: the limit is no bfloat16 number, and would round to 65536.
    return jnp.clip(y.astype(jnp.float32), -FP16_MAX, FP16_MAX)


class KeysValues(NamedTuple):
  """What cross-attention reads of a text; of all blocks, their axis first."""

  keys: Float[Array, "*layers b l heads head_dim"]
  values: Float[Array, "*layers b l heads head_dim"]


class CrossAttention(nnx.Module):
  """Softmax attention from the patches to the text tokens.

  `kv` is one product: on the last axis all keys, then all values.
  """

  def __init__(
    self,
    features: int,
    *,
    head_dim: int,
    qk_norm: bool,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.head_dim = head_dim
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.q = layers.Linear(
      features, features, axes=("embed", "heads"), **common
    )
    self.kv = layers.Linear(features, 2 * features, **common)
    self.norm_q = _qk_norm(features, param_dtype) if qk_norm else None
    self.norm_k = _qk_norm(features, param_dtype) if qk_norm else None
    self.out = layers.Linear(
      features, features, axes=("heads", "embed"), **common
    )

  def __call__(
    self,
    x: Float[Array, "b *n d"],
    text: Float[Array, "b l d"] | KeysValues,
    text_mask: Bool[Array, "b l"] | None,
  ) -> Float[Array, "b *n d"]:
    """Attends.

    Args:
      x: patches, their rows and columns apart or not.
      text: tokens, or what `encode` makes of them.
    """
    q = self.q(x)
    if self.norm_q is not None:
      q = self.norm_q(q)
    q = _split_heads(q, self.head_dim, "rows")
    k, v = text if isinstance(text, KeysValues) else self.encode(text)
    mask = None if text_mask is None else text_mask[:, None]
    y = attention_op.softmax_attention(q, k, v, mask=mask)
    return self.out(y.reshape(x.shape))

  def encode(self, text: Float[Array, "b l d"]) -> KeysValues:
    """Returns keys and values of a text, whatever is going to attend to it."""
    k, v = self.kv.split(text, 2, axis="heads")
    if self.norm_k is not None:
      k = self.norm_k(k)
    return KeysValues(*(_split_heads(y, self.head_dim, None) for y in (k, v)))


def _qk_norm(features: int, param_dtype: DTypeLike) -> layers.RMSNorm:
  return layers.RMSNorm(features, eps=QK_NORM_EPS, param_dtype=param_dtype)


def _split_heads(
  x: Float[Array, "b *n d"], head_dim: int, tokens: str | None
) -> Float[Array, "b tokens heads head_dim"]:
  x = x.reshape(x.shape[0], -1, x.shape[-1] // head_dim, head_dim)
  return sharding.constrain(x, ("batch", tokens, "heads", None))
