"""Parts of convolutional networks: batch norm, and resampling by two."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax.nn import layers

DOWNSAMPLE_METHODS = ("conv", "pixel_unshuffle")
UPSAMPLE_METHODS = ("interpolate", "pixel_shuffle")


def pixel_unshuffle(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
  """Moves each 2x2 cell into channels: out[4c + 2dy + dx] = in[c](dy, dx)."""
  b, h, w, c = x.shape
  x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
  return x.reshape(b, h // 2, w // 2, 4 * c)


def pixel_shuffle(x: Float[Array, "b h w d"]) -> Float[Array, "b h2 w2 c"]:
  """Inverse of `pixel_unshuffle`."""
  b, h, w, d = x.shape
  x = x.reshape(b, h, w, d // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3)
  return x.reshape(b, 2 * h, 2 * w, d // 4)


def nearest_upsample(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
  """Repeats every pixel into a 2x2 cell."""
  b, h, w, c = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
  return x.reshape(b, 2 * h, 2 * w, c)


def upsampled_conv(
  x: Float[Array, "b h w i"],
  kernel: Float[Array, "3 3 i o"],
  *,
  implementation: str | None = None,
) -> Float[Array, "b h2 w2 o"]:
  """Convolves `nearest_upsample(x)` with zero padding 1, without making it.

  Along a side, an output pixel sees two input pixels through three taps, two of
  which see the same: four sums of taps for the two phases of an output pixel.
  With 16 sums of the 9 taps, 4/9 of the multiplications are left.

  Args:
    implementation: "corners", one convolution for all phases; or "dilated", a
      transposed convolution, which XLA compiles well for TPUs alone. None: the
      better one for the device that it is lowered for.

  Raises:
    ValueError: an unknown implementation.
  """
  if implementation is None:
    return jax.lax.platform_dependent(
      x, kernel, tpu=_dilated_conv, default=_corner_conv
    )
  if implementation == "corners":
    return _corner_conv(x, kernel)
  if implementation == "dilated":
    return _dilated_conv(x, kernel)
  raise ValueError(
    "implementation must be 'corners', 'dilated' or None, got "
    f"{implementation!r}."
  )


# How the taps of a 3x3 kernel add up, along a side: the sums that two
# neighbouring pixels meet in the second phase of a cell, then those in the
# first phase of the next cell.
_CORNER_SUMS = (((1, 1, 0), (0, 0, 1)), ((1, 0, 0), (0, 1, 1)))
# The same sums as taps on pixels with zeros between them.
_DILATED_SUMS = ((1, 0, 0), (1, 1, 0), (0, 1, 1), (0, 0, 1))


def _corner_conv(x: Array, kernel: Array) -> Array:
  """Makes the 2x2 cell of outputs around each corner of the input pixels."""
  b, h, w, _ = x.shape
  sums = jnp.asarray(_CORNER_SUMS, jnp.float32)
  kernel = _sum_taps("pak,qbl,klio->abipqo", sums, kernel, x.dtype)
  cells = _conv(x, kernel.reshape(*kernel.shape[:3], -1), padding=1)
  cells = cells.reshape(b, h + 1, w + 1, 2, 2, -1).transpose(0, 1, 3, 2, 4, 5)
  y = cells.reshape(b, 2 * h + 2, 2 * w + 2, -1)
  # The outermost corners have but half a cell, or a quarter, in the picture.
  return y[:, 1:-1, 1:-1]


def _dilated_conv(x: Array, kernel: Array) -> Array:
  sums = jnp.asarray(_DILATED_SUMS, jnp.float32)
  kernel = _sum_taps("ak,bl,klio->abio", sums, kernel, x.dtype)
  return _conv(x, kernel, padding=2, dilation=2)


def _sum_taps(
  equation: str, sums: Array, kernel: Array, dtype: DTypeLike
) -> Array:
  # Sums of few taps, rounded once: in float32, whatever their own precision.
  wide = kernel.astype(jnp.promote_types(kernel.dtype, jnp.float32))
  sums = sums.astype(wide.dtype)
  y = jnp.einsum(equation, sums, sums, wide, precision="highest")
  return y.astype(dtype)


def _conv(x: Array, kernel: Array, *, padding: int, dilation: int = 1) -> Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    (1, 1),
    ((padding, padding),) * 2,
    lhs_dilation=(dilation, dilation),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def reach_before_upsample(reach: int, method: str) -> int:
  """Says how far pixels see before an `Upsample`, that see `reach` after it.

  Args:
    method: "interpolate" or "pixel_shuffle".
  """
  conv = layers.Conv.reach
  if method == "pixel_shuffle":
    return -(-reach // 2) + conv
  return -(-(reach + conv) // 2)


def average_channels(
  x: Float[Array, "b h w c"], features: int
) -> Float[Array, "b h w d"]:
  """Averages groups of consecutive channels down to `features`."""
  return x.reshape(*x.shape[:-1], features, -1).mean(axis=-1)


def repeat_channels(
  x: Float[Array, "b h w c"], features: int
) -> Float[Array, "b h w d"]:
  """Repeats each channel in place up to `features`."""
  return jnp.repeat(x, features // x.shape[-1], axis=-1)


class BatchNorm(nnx.Module):
  """(x - mean) / sqrt(var + eps) * scale + bias with stored statistics.

  For inference and fine-tuning of published models that were trained with batch
  norm: `mean` and `var` are loaded like parameters but are constants. They are
  not updated from batches and receive zero gradients, so only an optimiser's
  weight decay could change them; exclude them from it. New models are better
  trained with RMS norm.
  """

  def __init__(
    self, features: int, *, eps: float, param_dtype: DTypeLike = jnp.float32
  ):
    self.eps = eps
    self.mean = nnx.Param(jnp.zeros((features,), param_dtype))
    self.var = nnx.Param(jnp.ones((features,), param_dtype))
    self.scale = nnx.Param(jnp.ones((features,), param_dtype))
    self.bias = nnx.Param(jnp.zeros((features,), param_dtype))

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    # float32: folding a small variance into the scale amplifies rounding.
    mean, var, scale, bias = (
      leaf[...].astype(jnp.float32).reshape(1, 1, 1, -1)
      for leaf in (self.mean, self.var, self.scale, self.bias)
    )
    mean, var = jax.lax.stop_gradient((mean, var))
    scale = scale * jax.lax.rsqrt(var + self.eps)
    return ((x.astype(jnp.float32) - mean) * scale + bias).astype(x.dtype)


class Downsample(nnx.Module):
  """Halves height and width: learned conv plus, optionally, an average.

  conv: 3x3 with stride 2, or stride 1 to a quarter of the channels followed by
  `pixel_unshuffle`. Shortcut: `pixel_unshuffle`, averaged over consecutive
  channels.

  Args:
    method: "conv" or "pixel_unshuffle".

  Raises:
    ValueError: an unknown method, or channels that it cannot divide.

  Source: Chen et al., DC-AE, arXiv:2410.10733, section 3.2.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    method: str,
    shortcut: bool = True,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if method not in DOWNSAMPLE_METHODS:
      raise ValueError(
        f"downsample method must be one of {DOWNSAMPLE_METHODS}, "
        f"got {method!r}."
      )
    self.unshuffle = method == "pixel_unshuffle"
    if self.unshuffle and out_features % 4:
      raise ValueError(
        f"pixel_unshuffle makes channels in fours: got {out_features}."
      )
    if shortcut and 4 * in_features % out_features:
      raise ValueError(
        f"the downsampling shortcut averages 4 * {in_features} channels in "
        f"equal groups: {out_features} output channels do not divide them."
      )
    self.features = out_features
    self.shortcut = shortcut
    self.conv = layers.Conv(
      in_features,
      out_features // 4 if self.unshuffle else out_features,
      stride=1 if self.unshuffle else 2,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    y = self.conv(x)
    if self.unshuffle:
      y = pixel_unshuffle(y)
    if self.shortcut:
      y = y + average_channels(pixel_unshuffle(x), self.features)
    return y


class Upsample(nnx.Module):
  """Doubles height and width: learned conv plus, optionally, a repetition.

  conv: 3x3 after nearest-neighbour upsampling, or to four times the channels
  followed by `pixel_shuffle`. Shortcut: `pixel_shuffle` of repeated channels.

  Args:
    method: "interpolate" or "pixel_shuffle".

  Raises:
    ValueError: an unknown method, or channels that do not divide.

  Source: Chen et al., DC-AE, arXiv:2410.10733, section 3.2.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    method: str,
    shortcut: bool = True,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    if method not in UPSAMPLE_METHODS:
      raise ValueError(
        f"upsample method must be one of {UPSAMPLE_METHODS}, got {method!r}."
      )
    if shortcut and 4 * out_features % in_features:
      raise ValueError(
        f"the upsampling shortcut repeats {in_features} channels to "
        f"4 * {out_features}, which is no multiple of them."
      )
    self.shuffle = method == "pixel_shuffle"
    self.features = out_features
    self.shortcut = shortcut
    self.conv = layers.Conv(
      in_features,
      4 * out_features if self.shuffle else out_features,
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    if self.shuffle:
      y = pixel_shuffle(self.conv(x))
    else:
      y = upsampled_conv(x.astype(self.conv.dtype), self.conv.kernel[...])
      bias = self.conv.bias[...].astype(y.dtype)
      y = y + bias.reshape(1, 1, 1, -1)
    if self.shortcut:
      y = y + pixel_shuffle(repeat_channels(x, 4 * self.features))
    return y
