"""Depthwise convolution as shifted multiply-adds, with derivatives alike.

Two bilinear primitives that are each other's transposes: the convolution, and
the gradient of its kernel. Autodiff of the shifts gives the same numbers, but
as sums of padded products, which XLA:CPU computes several times slower.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from sana_jax import sharding


def depthwise_conv(
  x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"]
) -> Float[Array, "b h w c"]:
  """Filters every channel on its own, stride 1, zero padding to keep the size.

  out[y, x, c] = sum_ij kernel[i, j, c] * in[y + i - kh//2, x + j - kw//2, c]

  Not a grouped `lax.conv`: on CPU that runs on one core and is 10-60 times
  slower, and on TPU a channel-sharded kernel makes XLA gather the global batch.
  The sum of kh * kw shifted products fuses and shards like any element-wise
  expression, and so do its derivatives (forward and reverse, of any order).

  Where a mesh in use shards the rows, neighbours exchange kh // 2 of them.

  Raises:
    ValueError: an even kernel side, which has no centre; rows that do not
      divide over the mesh, or fewer on a device than a neighbour needs.
  """
  kh, kw, _ = kernel.shape
  if kh % 2 == 0 or kw % 2 == 0:
    raise ValueError(
      f"depthwise_conv: kernel sides must be odd, got {(kh, kw)}."
    )
  dtype = jnp.result_type(x, kernel)
  x, kernel = x.astype(dtype), kernel.astype(dtype)
  halo, shards = kh // 2, sharding.shards("rows")
  if shards == 1 or halo == 0:
    return _conv(x, kernel)
  if x.shape[1] % shards or x.shape[1] // shards < halo:
    raise ValueError(
      f"depthwise_conv: {x.shape[1]} rows do not divide over sequence={shards} "
      f"with at least {halo} on each device; use a smaller sequence axis."
    )
  # Left to the compiler, the shifts of sharded rows become permutations of
  # whole shards, one for every row of the kernel.
  rows = PartitionSpec(None, sharding.RULES["rows"])
  return jax.shard_map(
    functools.partial(_filter_shard, shards=shards),
    in_specs=(rows, PartitionSpec()),
    out_specs=rows,
    axis_names=set(sharding.RULES["rows"]),
  )(x, kernel)


def _filter_shard(
  x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"], *, shards: int
) -> Float[Array, "b h w c"]:
  """Filters the rows of one device, after an exchange with its neighbours."""
  halo, axis = kernel.shape[0] // 2, sharding.RULES["rows"]
  down = [(i, i + 1) for i in range(shards - 1)]
  up = [(i + 1, i) for i in range(shards - 1)]
  # Who has no neighbour receives zeros: the padding of the picture.
  above = jax.lax.ppermute(x[:, -halo:], axis, down)
  below = jax.lax.ppermute(x[:, :halo], axis, up)
  x = jnp.concatenate([above, x, below], axis=1)
  # The transpose of the cast adds up the kernel's gradient over the devices.
  kernel = jax.lax.pcast(kernel, axis, to="varying")
  return _conv(x, kernel)[:, halo:-halo]


def _conv(
  x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"]
) -> Float[Array, "b h w c"]:
  return _conv_p.bind(x, kernel)


def _kernel_gradient(
  x: Float[Array, "b h w c"],
  out: Float[Array, "b h w c"],
  sides: tuple[int, int],
) -> Float[Array, "kh kw c"]:
  """Sums the products of `out` with `x` at every shift of a kernel."""
  return _kernel_gradient_p.bind(x, out, sides=sides)


def _flip(kernel: Float[Array, "kh kw c"]) -> Float[Array, "kh kw c"]:
  """The kernel of the transposed convolution."""
  return kernel[::-1, ::-1]


def _shifts(
  x: Float[Array, "b h w c"], sides: tuple[int, int]
) -> Iterator[Float[Array, "b h w c"]]:
  """What each element of a kernel sees of `x`, row by row of the kernel."""
  (kh, kw), (_, height, width, _) = sides, x.shape
  rows, columns = (kh // 2,) * 2, (kw // 2,) * 2
  padded = jnp.pad(x, ((0, 0), rows, columns, (0, 0)))
  for i in range(kh):
    for j in range(kw):
      yield padded[:, i : i + height, j : j + width]


def _conv_formula(
  x: Float[Array, "b h w c"], kernel: Float[Array, "kh kw c"]
) -> Float[Array, "b h w c"]:
  kh, kw, channels = kernel.shape
  taps = kernel.reshape(kh * kw, 1, 1, 1, channels)
  products = (
    shifted * tap
    for shifted, tap in zip(_shifts(x, (kh, kw)), taps, strict=True)
  )
  return sum(products, start=jnp.zeros((), x.dtype))


def _kernel_gradient_formula(
  x: Float[Array, "b h w c"],
  out: Float[Array, "b h w c"],
  *,
  sides: tuple[int, int],
) -> Float[Array, "kh kw c"]:
  """Sums in float32 or better, whatever the dtype."""
  wide = jnp.promote_types(x.dtype, jnp.float32)
  out = out.astype(wide)
  products = (shifted.astype(wide) * out for shifted in _shifts(x, sides))
  sums = jnp.stack([p.sum((0, 1, 2)) for p in products])
  return sums.reshape(*sides, x.shape[-1]).astype(x.dtype)


def _conv_type(x: jax.core.ShapedArray, kernel: jax.core.ShapedArray):
  _check("depthwise_conv", x, kernel, (4, 3))
  return x


def _kernel_gradient_type(
  x: jax.core.ShapedArray, out: jax.core.ShapedArray, *, sides: tuple[int, int]
):
  _check("depthwise_conv_kernel_gradient", x, out, (4, 4))
  return x.update(shape=(*sides, x.shape[-1]))


def _check(name: str, a, b, ranks: tuple[int, int]) -> None:
  alike = a.shape[-1:] == b.shape[-1:] and a.dtype == b.dtype
  if (len(a.shape), len(b.shape)) != ranks or not alike:
    raise TypeError(
      f"{name}: expected ranks {ranks}, one dtype and as many channels, got "
      f"{a.str_short()} and {b.str_short()}."
    )


def _batch_conv(args, axes):
  """Samples join the batch; with kernels of their own, the channels."""
  (x, kernel), (x_axis, kernel_axis) = args, axes
  if kernel_axis is None:
    x = jnp.moveaxis(x, x_axis, 0)
    out = _conv(x.reshape(-1, *x.shape[2:]), kernel)
    return out.reshape(x.shape), 0
  size = kernel.shape[kernel_axis]
  out = _conv(
    *(_join_channels(*pair, size) for pair in zip(args, axes, strict=True))
  )
  return out.reshape(*out.shape[:-1], size, -1), out.ndim - 1


def _batch_kernel_gradient(args, axes, *, sides):
  size = next(
    a.shape[axis]
    for a, axis in zip(args, axes, strict=True)
    if axis is not None
  )
  joined = (
    _join_channels(*pair, size) for pair in zip(args, axes, strict=True)
  )
  kernel = _kernel_gradient(*joined, sides=sides)
  return kernel.reshape(*sides, size, -1), 2


def _join_channels(x: Array, axis: int | None, size: int) -> Array:
  """Makes channels of a batched axis, which is the slower of the two."""
  if axis is None:
    shape = (*x.shape[:-1], size, x.shape[-1])
    x = jnp.broadcast_to(x[..., None, :], shape)
  else:
    x = jnp.moveaxis(x, axis, -2)
  return x.reshape(*x.shape[:-2], -1)


_conv_p = core.Primitive("depthwise_conv")
_conv_p.def_impl(jax.jit(_conv))
_conv_p.def_abstract_eval(_conv_type)
batching.primitive_batchers[_conv_p] = _batch_conv
mlir.register_lowering(
  _conv_p, mlir.lower_fun(_conv_formula, multiple_results=False)
)

_kernel_gradient_p = core.Primitive("depthwise_conv_kernel_gradient")
_kernel_gradient_p.def_impl(jax.jit(_kernel_gradient, static_argnames="sides"))
_kernel_gradient_p.def_abstract_eval(_kernel_gradient_type)
batching.primitive_batchers[_kernel_gradient_p] = _batch_kernel_gradient
mlir.register_lowering(
  _kernel_gradient_p,
  mlir.lower_fun(_kernel_gradient_formula, multiple_results=False),
)

ad.defbilinear(
  _conv_p,
  lambda out, x, kernel: _conv(out, _flip(kernel)),
  lambda out, x, kernel: _kernel_gradient(x, out, sides=kernel.aval.shape[:2]),
)
ad.defbilinear(
  _kernel_gradient_p,
  lambda kernel, x, out, *, sides: _conv(out, _flip(kernel)),
  lambda kernel, x, out, *, sides: _conv(x, kernel),
)
