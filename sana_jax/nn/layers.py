"""Linear, Conv, norms and embeddings with explicit dtypes.

Every layer keeps its parameters in `param_dtype` and computes in `dtype`.
Kernels are `[in, out]` and `[kh, kw, in, out]`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax import sharding
from sana_jax.ops import last_axis

Initializer = Callable[..., Array]

XAVIER_UNIFORM: Initializer = nnx.initializers.xavier_uniform()
ZEROS: Initializer = nnx.initializers.zeros_init()

# What rematerialisation knows kernels by that were gathered to be used.
GATHERED = "gathered_kernel"


def torch_default_init(fan_in: int) -> Initializer:
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for conv layers."""
  bound = 1.0 / math.sqrt(fan_in)

  def init(key, shape, dtype=jnp.float32):
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class Linear(nnx.Module):
  """y = x @ kernel + bias over the last axis.

  Args:
    axes: logical axes of the kernel; one is `embed`, which is gathered where
      the kernel is used.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    kernel_init: Initializer = XAVIER_UNIFORM,
    bias_init: Initializer = ZEROS,
    axes: tuple[str | None, str | None] = ("embed", None),
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    self.axes = axes
    self.kernel = nnx.Param(
      kernel_init(rngs.params(), (in_features, out_features), param_dtype)
    )
    self.bias = (
      nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype))
      if use_bias
      else None
    )

  def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    kernel = self.kernel[...].astype(self.dtype)
    y = product(x.astype(self.dtype), kernel, self.axes)
    if self.bias is None:
      return y
    return y + _row(self.bias[...].astype(self.dtype), y.ndim)

  def split(
    self, x: Float[Array, "*b i"], parts: int, axis: str
  ) -> tuple[Float[Array, "*b o"], ...]:
    """Computes `jnp.split(self(x), parts, axis=-1)`.

    Where a mesh in use shards the logical axis `axis`, every device has its
    share of every part: moved for that is the kernel, not the result.
    """
    if sharding.shards(axis) == 1:
      return tuple(jnp.split(self(x), parts, axis=-1))
    kernel = self.kernel[...].astype(self.dtype)
    kernel = kernel.reshape(kernel.shape[0], parts, -1)
    # First the exchange among a few, then what gathers the width.
    kernel = sharding.constrain(kernel, ("embed", None, axis))
    y = product(x.astype(self.dtype), kernel, ("embed", None, axis))
    if self.bias is not None:
      bias = self.bias[...].astype(self.dtype).reshape(parts, -1)
      bias = sharding.constrain(bias, (None, axis))
      y = y + bias.reshape((1,) * (y.ndim - 2) + bias.shape)
    return tuple(y[..., part, :] for part in range(parts))


class Conv(nnx.Module):
  """Dense 2-D convolution with symmetric zero padding kernel_size // 2.

  XLA's "SAME" pads a strided convolution on the far side only; the published
  models pad both sides, so the padding is always explicit.

  Attributes:
    reach: pixels to each side that one depends on, with the default size.
  """

  reach = 1

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    use_bias: bool = True,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.dtype = dtype
    self.stride = stride
    self.padding = kernel_size // 2
    init = torch_default_init(in_features * kernel_size**2)
    shape = (kernel_size, kernel_size, in_features, out_features)
    self.kernel = nnx.Param(init(rngs.params(), shape, param_dtype))
    self.bias = (
      nnx.Param(init(rngs.params(), (out_features,), param_dtype))
      if use_bias
      else None
    )

  def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b h2 w2 o"]:
    y = jax.lax.conv_general_dilated(
      x.astype(self.dtype),
      self.kernel[...].astype(self.dtype),
      (self.stride, self.stride),
      ((self.padding, self.padding),) * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    if self.bias is None:
      return y
    return y + _row(self.bias[...].astype(self.dtype), y.ndim)


class LayerNorm(nnx.Module):
  """(x - mean) / sqrt(var + eps), times scale plus bias when affine."""

  def __init__(
    self,
    features: int,
    *,
    eps: float = 1e-6,
    affine: bool = False,
    param_dtype: DTypeLike = jnp.float32,
  ):
    self.eps = eps
    self.scale = (
      nnx.Param(jnp.ones((features,), param_dtype)) if affine else None
    )
    self.bias = (
      nnx.Param(jnp.zeros((features,), param_dtype)) if affine else None
    )

  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    # float32: the mean square of a wide residual stream needs the mantissa.
    y = x.astype(jnp.float32)
    y = y - last_axis.mean(y)
    y = y * jax.lax.rsqrt(last_axis.mean(jnp.square(y)) + self.eps)
    if self.scale is not None:
      y = y * _row(self.scale[...], y.ndim) + _row(self.bias[...], y.ndim)
    return y.astype(x.dtype)


class RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * scale (+ bias), statistics in float32.

  Args:
    scale_init: initial value of the scale; with `zero_centered` the stored
      parameter w acts as 1 + w (Gemma's convention).
  """

  def __init__(
    self,
    features: int,
    *,
    eps: float,
    use_bias: bool = False,
    zero_centered: bool = False,
    scale_init: float = 1.0,
    param_dtype: DTypeLike = jnp.float32,
  ):
    self.eps = eps
    self.zero_centered = zero_centered
    stored = scale_init - 1.0 if zero_centered else scale_init
    self.scale = nnx.Param(jnp.full((features,), stored, param_dtype))
    self.bias = (
      nnx.Param(jnp.zeros((features,), param_dtype)) if use_bias else None
    )

  def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(last_axis.mean(jnp.square(y)) + self.eps)
    scale = self.scale[...].astype(jnp.float32)
    y = y * _row(1.0 + scale if self.zero_centered else scale, y.ndim)
    if self.bias is not None:
      y = y + _row(self.bias[...].astype(jnp.float32), y.ndim)
    return y.astype(x.dtype)


def product(
  x: Float[Array, "*b i"], kernel: Array, axes: tuple[str | None, ...]
) -> Array:
  """Contracts the last axis of `x` with the first of `kernel`.

  Where a mesh in use cuts the `embed` axis of the kernel, that is gathered, in
  the dtype it has, and the sum of its gradients is scattered.

  Args:
    axes: logical axes of the kernel.
  """
  count, samples = sharding.shards("embed"), sharding.shards("batch")
  divides = kernel.shape[axes.index("embed")] % count == 0
  divides = divides and x.ndim > 1 and x.shape[0] % samples == 0
  # With rows, the compiler moves shards of gradients to where they belong. On
  # CPUs, exchanges of a shard_map may wait for one another for ever, and sums
  # of bfloat16 end the process.
  left_to_compiler = sharding.shards("rows") > 1 or sharding.platform() == "cpu"
  if count > 1 and divides and not left_to_compiler:
    return scattering_product(x, kernel, axes)
  kernel = sharding.constrain(kernel, _in_use(axes))
  if count > 1:
    kernel = checkpoint_name(kernel, GATHERED)
  return jnp.tensordot(x, kernel, 1)


def scattering_product(
  x: Float[Array, "*b i"], kernel: Array, axes: tuple[str | None, ...]
) -> Array:
  """Computes `product`, with a transpose that scatters on every device.

  Samples, and the `embed` axis of the kernel, must divide over the mesh in use.
  """
  (fsdp,) = sharding.RULES["embed"]
  batch = sharding.RULES["batch"]
  dim = axes.index("embed")

  def local(x, kernel):
    kernel = sharding.gather_shards(kernel, fsdp, dim)
    kernel = sharding.constrain(kernel, _in_use(axes))
    return jnp.tensordot(x, checkpoint_name(kernel, GATHERED), 1)

  # Of samples and shards every device sees its own. Left to itself, the
  # compiler might move activations, or sum gradients whole on every device.
  return jax.shard_map(
    local,
    in_specs=(PartitionSpec(batch), PartitionSpec(*(None,) * dim, fsdp)),
    out_specs=PartitionSpec(batch),
    axis_names=set(batch),
    check_vma=False,
  )(x, sharding.constrain(kernel, axes))


def sinusoidal_embedding(
  time: Float[Array, " b"], width: int
) -> Float[Array, "b width"]:
  """[cos(t f), sin(t f)] with f_i = 10000^(-i / (width/2)), in float32."""
  half = width // 2
  frequencies = jnp.exp(
    -math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half
  )
  angles = time.astype(jnp.float32)[:, None] * frequencies[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def _row(vector: Float[Array, " d"], ndim: int) -> Array:
  """Gives a vector leading axes of size one (no implicit rank promotion)."""
  return vector.reshape((1,) * (ndim - 1) + (-1,))


def _in_use(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
  """The logical axes that are still cut where a kernel is used."""
  return tuple(None if axis == "embed" else axis for axis in axes)
