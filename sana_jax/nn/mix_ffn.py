"""Mix-FFN: a gated inverted bottleneck with a depthwise convolution."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax import sharding
from sana_jax.nn import layers
from sana_jax.ops import gated_conv as gated_conv_op


class MixFFN(nnx.Module):
  """point(a * silu(g)) with [a, g] = depth(silu(inverted(x))).

  `inverted` and `point` are 1x1 convolutions (matrix products); `depth` is a
  3x3 depthwise convolution on 2 * hidden channels. The first half of the
  channels is the value, the second half the gate.

  Source: SANA, arXiv:2410.10629, section 2.2 (GLUMBConv).
  """

  def __init__(
    self,
    features: int,
    hidden: int,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    expand_init = layers.torch_default_init(features)
    depth_init = layers.torch_default_init(9)
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.inverted = layers.Linear(
      features,
      2 * hidden,
      kernel_init=expand_init,
      bias_init=expand_init,
      **common,
    )
    self.depth_kernel = nnx.Param(
      depth_init(rngs.params(), (3, 3, 2 * hidden), param_dtype)
    )
    self.depth_bias = nnx.Param(
      depth_init(rngs.params(), (2 * hidden,), param_dtype)
    )
    self.point = layers.Linear(
      hidden,
      features,
      use_bias=False,
      kernel_init=layers.torch_default_init(hidden),
      axes=("mlp", "embed"),
      **common,
    )

  def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    # Where a mesh cuts the channels, values and gates are apart: a shard has
    # the same channels of both. Together, they are in memory once.
    parts = 1 if sharding.shards("mlp") == 1 else 2
    kernel = self.depth_kernel[...].astype(self.dtype).reshape(3, 3, 2, -1)
    kernel = sharding.constrain(kernel, (None, None, None, "mlp"))
    bias = self.depth_bias[...].astype(self.dtype).reshape(2, -1)
    bias = sharding.constrain(bias, (None, "mlp"))
    expanded = self.inverted.split(x, parts, axis="mlp")
    return self.point(gated_conv_op.gated_conv(expanded, kernel, bias))
