"""Depthwise convolutions by XLA: the definition, and the derivative."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.ops import depthwise_conv as depthwise_conv_op


def gated_conv(
  inputs: tuple[Float[Array, "b h w _"], ...],
  kernel: Float[Array, "kh kw 2 c"],
  bias: Float[Array, "2 c"],
) -> Float[Array, "b h w c"]:
  """Computes a * silu(g) with [a, g] = depthwise(silu(inputs)) + bias."""
  # Inputs that are one array stay one: then it is in memory once.
  parts = len(inputs)
  kernels = kernel.reshape(*kernel.shape[:2], parts, -1)
  biases = bias.reshape(parts, 1, 1, 1, -1)
  filtered = [
    depthwise_conv_op.depthwise_conv(jax.nn.silu(x), kernels[:, :, part])
    + biases[part]
    for part, x in enumerate(inputs)
  ]
  value, gate = filtered if parts == 2 else jnp.split(filtered[0], 2, axis=-1)
  return value * jax.nn.silu(gate)


def conv(
  inputs: tuple[Float[Array, "b h w c"]], kernel: Float[Array, "kh kw c"]
) -> Float[Array, "b h w c"]:
  """Filters every channel on its own."""
  return depthwise_conv_op.depthwise_conv(inputs[0], kernel)
