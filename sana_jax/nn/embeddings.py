"""Entrances of a diffusion transformer: patches, positions, time, text."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Num

from sana_jax.nn import layers

TIME_FEATURES = 256
CAPTION_NORM_EPS = 1e-5
# Training starts with small captions; the scale is learned.
CAPTION_NORM_INIT = 0.01


def patchify(
  x: Float[Array, "b h w c"], patch_size: int
) -> Float[Array, "b h2 w2 p"]:
  """Gathers each patch into one vector, ordered (row, column, channel)."""
  b, h, w, c = x.shape
  p = patch_size
  x = x.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h // p, w // p, p * p * c)


def unpatchify(
  x: Float[Array, "b h2 w2 p"], patch_size: int
) -> Float[Array, "b h w c"]:
  """Inverse of `patchify`."""
  b, h, w, _ = x.shape
  p = patch_size
  x = x.reshape(b, h, w, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * p, w * p, -1)


def sincos_2d(
  height: int,
  width: int,
  features: int,
  *,
  base_size: int,
  interpolation_scale: float,
) -> Float[Array, "h w d"]:
  """[E(x), E(y)] with E(p) = [sin(p f), cos(p f)]: width first.

  f_k = 10000^(-k / (features/4)). Whatever the grid, both coordinates run over
  [0, base_size / interpolation_scale): a wide image stretches them.

  Raises:
    ValueError: `features` is not a multiple of 4.

  Source: He et al., MAE, arXiv:2111.06377; SANA, arXiv:2410.10629, 2K and 4K.
  """
  if features % 4:
    raise ValueError(
      f"a 2-D sin-cos embedding needs a width divisible by 4, got {features}."
    )
  extent = base_size / interpolation_scale
  columns = _sincos_1d(width, features // 2, extent)
  rows = _sincos_1d(height, features // 2, extent)
  # The two small tables are the constants of a compiled program, not the grid.
  grid = (height, width, features // 2)
  return jnp.concatenate(
    [
      jnp.broadcast_to(columns[None], grid),
      jnp.broadcast_to(rows[:, None], grid),
    ],
    axis=-1,
  )


def _sincos_1d(size: int, features: int, extent: float) -> np.ndarray:
  # float64 on the host, rounded once: the checkpoints were trained with this.
  positions = np.arange(size, dtype=np.float64) * (extent / size)
  half = features // 2
  frequencies = 10000.0 ** (-np.arange(half, dtype=np.float64) / half)
  angles = positions[:, None] * frequencies
  table = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
  return table.astype(np.float32)


class PatchEmbed(nnx.Module):
  """Projects patches to the model's width, plus a positional embedding.

  Args:
    base_size: side, in patches, of the grid the positions were trained on.
    interpolation_scale: None: no positional embedding.
  """

  def __init__(
    self,
    in_channels: int,
    features: int,
    *,
    patch_size: int,
    base_size: int,
    interpolation_scale: float | None,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.patch_size = patch_size
    self.base_size = base_size
    self.interpolation_scale = interpolation_scale
    self.projection = layers.Linear(
      patch_size**2 * in_channels,
      features,
      axes=(None, "embed"),
      dtype=dtype,
      param_dtype=param_dtype,
      rngs=rngs,
    )

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 d"]:
    # float32: this starts the residual stream.
    x = self.projection(patchify(x, self.patch_size)).astype(jnp.float32)
    if self.interpolation_scale is None:
      return x
    positions = sincos_2d(
      *x.shape[1:],
      base_size=self.base_size,
      interpolation_scale=self.interpolation_scale,
    )
    return x + positions[None]


class TimeEmbed(nnx.Module):
  """linear_2(silu(linear_1(sinusoid(time)))), all in float32.

  Args:
    kernel_inits: of the two linear layers.
  """

  def __init__(
    self,
    features: int,
    *,
    kernel_inits: tuple[layers.Initializer, layers.Initializer],
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    first, second = kernel_inits
    self.linear_1 = layers.Linear(
      TIME_FEATURES,
      features,
      axes=(None, "embed"),
      kernel_init=first,
      param_dtype=param_dtype,
      rngs=rngs,
    )
    self.linear_2 = layers.Linear(
      features,
      features,
      kernel_init=second,
      param_dtype=param_dtype,
      rngs=rngs,
    )

  def __call__(self, time: Num[Array, " b"]) -> Float[Array, "b d"]:
    features = layers.sinusoidal_embedding(
      time.astype(jnp.float32), TIME_FEATURES
    )
    return self.linear_2(jax.nn.silu(self.linear_1(features)))


class CaptionEmbed(nnx.Module):
  """Computes norm(linear_2(gelu(linear_1(text)))), to the model's width."""

  def __init__(
    self,
    in_features: int,
    features: int,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    init = nnx.initializers.normal(0.02)
    self.linear_1 = layers.Linear(
      in_features,
      features,
      kernel_init=init,
      axes=(None, "embed"),
      **common,
    )
    self.linear_2 = layers.Linear(
      features, features, kernel_init=init, **common
    )
    self.norm = layers.RMSNorm(
      features,
      eps=CAPTION_NORM_EPS,
      scale_init=CAPTION_NORM_INIT,
      param_dtype=param_dtype,
    )

  def __call__(self, text: Float[Array, "b l c"]) -> Float[Array, "b l d"]:
    return self.norm(self.project(text))

  def project(self, text: Float[Array, "b l c"]) -> Float[Array, "b l d"]:
    y = jax.nn.gelu(self.linear_1(text), approximate=True)
    return self.linear_2(y)
