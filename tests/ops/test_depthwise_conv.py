import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import sharding
from sana_jax.ops import depthwise_conv as depthwise_conv_op


def _conv(x, kernel):
  return depthwise_conv_op.depthwise_conv(jnp.asarray(x), jnp.asarray(kernel))


def _loop(x, kernel):
  b, h, w, c = x.shape
  kh, kw, _ = kernel.shape
  out = np.zeros(x.shape)
  for n, y, z, ch in np.ndindex(b, h, w, c):
    for i in range(kh):
      for j in range(kw):
        row, column = y + i - kh // 2, z + j - kw // 2
        if 0 <= row < h and 0 <= column < w:
          out[n, y, z, ch] += kernel[i, j, ch] * x[n, row, column, ch]
  return out


@pytest.mark.parametrize("sides", [(3, 3), (5, 5), (1, 3)])
def test_depthwise_conv_equals_the_written_out_loop(rng, sides):
  x = rng.normal(size=(2, 4, 6, 3)).astype(np.float32)
  kernel = rng.normal(size=(*sides, 3)).astype(np.float32)
  out = _conv(x, kernel)
  # float32 sums of at most 25 products.
  np.testing.assert_allclose(out, _loop(x, kernel), rtol=1e-5, atol=1e-5)


def test_depthwise_conv_never_mixes_channels(rng):
  x = rng.normal(size=(1, 3, 3, 2)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 2)).astype(np.float32)
  changed = x.copy()
  changed[..., 1] += 1
  before, after = (_conv(y, kernel) for y in (x, changed))
  np.testing.assert_array_equal(before[..., 0], after[..., 0])
  assert np.abs(before[..., 1] - after[..., 1]).max() > 0.1


def test_depthwise_conv_has_forward_and_reverse_derivatives(rng):
  x, dx, out = rng.normal(size=(3, 1, 4, 5, 2)).astype(np.float32)
  kernel = rng.normal(size=(3, 3, 2)).astype(np.float32)
  fn = lambda x: _conv(x, kernel)  # noqa: E731
  forward = jax.jvp(fn, (x,), (dx,))[1]
  (backward,) = jax.vjp(fn, x)[1](out)
  # <out, J dx> = <J^T out, dx>, up to float32 rounding of 40 terms.
  np.testing.assert_allclose(
    np.sum(out * forward), np.sum(backward * dx), rtol=1e-4
  )


def _shifts(x, kernel):
  """The convolution as XLA's own operations, for their derivatives."""
  kh, kw, _ = kernel.shape
  _, h, w, _ = x.shape
  padded = jnp.pad(x, ((0, 0), (kh // 2,) * 2, (kw // 2,) * 2, (0, 0)))
  return sum(
    padded[:, i : i + h, j : j + w] * kernel[i, j].reshape(1, 1, 1, -1)
    for i, j in np.ndindex(kh, kw)
  )


def _derivatives(function, x, kernel, dx, dk, out):
  """First derivatives both ways, and both second ones made of them."""
  fn = lambda x, k: jnp.tanh(function(x, k))  # noqa: E731
  jvp = lambda x, k: jax.jvp(fn, (x, k), (dx, dk))[1]  # noqa: E731
  vjp = lambda x, k: jax.vjp(fn, x, k)[1](out)  # noqa: E731
  return {
    "jvp": jvp(x, kernel),
    "vjp": vjp(x, kernel),
    "jvp of vjp": jax.jvp(vjp, (x, kernel), (dx, dk))[1],
    "vjp of jvp": jax.vjp(jvp, x, kernel)[1](out),
    "of x alone": jax.grad(lambda x: fn(x, kernel).sum())(x),
    "of the kernel alone": jax.grad(lambda k: fn(x, k).sum())(kernel),
  }


def _inputs(rng, sides, dtype=np.float32, size=(2, 4, 6, 3)):
  x, dx, out = (rng.normal(size=size).astype(dtype) for _ in range(3))
  kernel, dk = (rng.normal(size=(*sides, size[-1])) for _ in range(2))
  return x, kernel.astype(dtype), dx, dk.astype(dtype), out


@pytest.mark.parametrize("sides", [(3, 3), (5, 5), (1, 3), (7, 1)])
def test_all_derivatives_are_those_of_the_shifts_in_float64(rng, sides):
  args = _inputs(rng, sides)
  found = jax.jit(lambda *a: _derivatives(_conv, *a))(*args)
  with jax.enable_x64(True):
    wide = [jnp.asarray(a, jnp.float64) for a in args]
    wanted = _derivatives(_shifts, *wide)
  # float32 sums of up to 48 positions x 35 shifts, and tanh.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    found,
    jax.tree.map(np.asarray, wanted),
  )


@pytest.mark.parametrize("axes", [(0, None), (2, None), (None, 1), (1, 3)])
def test_vmap_equals_a_loop_with_its_derivatives(rng, axes):
  args = [_inputs(rng, (3, 3)) for _ in range(3)]
  x, kernel, dx, dk, out = (np.stack(a) for a in zip(*args, strict=True))
  x, dx = (x, dx) if axes[0] is not None else (x[0], dx[0])
  kernel, dk = (kernel, dk) if axes[1] is not None else (kernel[0], dk[0])
  in_axes = (axes[0], axes[1], axes[0], axes[1], 0)

  def place(value, axis):
    return value if axis is None else np.moveaxis(value, 0, axis)

  found = jax.vmap(functools.partial(_derivatives, _conv), in_axes)(
    *map(place, (x, kernel, dx, dk, out), in_axes)
  )
  for i in range(3):
    one = [
      a if axis is None else a[i]
      for a, axis in zip((x, kernel, dx, dk, out), in_axes, strict=True)
    ]
    # Sums are taken in another order.
    jax.tree.map(
      lambda a, b, i=i: np.testing.assert_allclose(
        a[i], b, rtol=1e-4, atol=1e-4
      ),
      found,
      _derivatives(_shifts, *map(jnp.asarray, one)),
    )


def test_the_gradient_of_a_bfloat16_kernel_is_added_up_in_float32(rng):
  x, kernel, _, _, out = _inputs(
    rng, (3, 3), dtype=jnp.bfloat16, size=(8, 16, 16, 2)
  )
  found = jax.vjp(lambda k: _conv(x, k), kernel)[1](jnp.asarray(out))[0]
  with jax.enable_x64(True):
    x, kernel, out = (
      jnp.asarray(np.asarray(a, np.float64)) for a in (x, kernel, out)
    )
    wanted = jax.vjp(lambda k: _shifts(x, k), kernel)[1](out)[0]
  # One rounding to 8 bits; 2048 terms added up in bfloat16 are off by tens of
  # percent of the larger sums.
  np.testing.assert_allclose(
    found.astype(np.float32), np.asarray(wanted), rtol=2**-8, atol=1e-3
  )


@pytest.mark.parametrize("remat", [False, True])
def test_no_derivative_is_a_grouped_convolution(rng, remat):
  args = _inputs(rng, (3, 3))
  conv = jax.checkpoint(_conv) if remat else _conv
  lowered = jax.jit(lambda *a: _derivatives(conv, *a)).lower(*args)
  assert "multiply" in lowered.as_text()
  assert "convolution" not in lowered.as_text()
  assert "convolution(" not in lowered.compile().as_text()


def test_depthwise_conv_widens_to_the_wider_dtype(rng):
  x, kernel, *_ = _inputs(rng, (3, 3))
  narrow = jnp.asarray(x, jnp.bfloat16)
  out, gradient = jax.value_and_grad(lambda x: _conv(x, kernel).sum())(narrow)
  assert (out.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize(
  ("shape", "dtype"), [((3, 3, 1), np.float32), ((3, 3), np.float32)]
)
def test_a_kernel_of_other_channels_is_an_error(rng, unchecked, shape, dtype):
  x = rng.normal(size=(1, 4, 4, 2)).astype(np.float32)
  kernel = rng.normal(size=shape).astype(dtype)
  with pytest.raises(TypeError, match="as many channels, got"):
    depthwise_conv_op._conv(jnp.asarray(x), jnp.asarray(kernel))


def test_depthwise_conv_refuses_an_even_kernel(rng):
  x = rng.normal(size=(1, 4, 4, 2)).astype(np.float32)
  kernel = rng.normal(size=(2, 3, 2)).astype(np.float32)
  with pytest.raises(ValueError, match="must be odd"):
    _conv(x, kernel)


def _on_mesh(sizes, function, *args):
  mesh = sharding.make_mesh(sizes)

  def traced(*args):
    with sharding.use(mesh):
      return function(*args)

  return jax.jit(traced)(*jax.device_put(args, sharding.replicated(mesh)))


@pytest.mark.parametrize("side", [3, 5])
def test_rows_on_several_devices_change_nothing(rng, side):
  x, dx, out = rng.normal(size=(3, 2, 8, 5, 4)).astype(np.float32)
  kernel, dk = rng.normal(size=(2, side, side, 4)).astype(np.float32)

  def derivatives(x, kernel, dx, dk, out):
    # Scanned and rematerialised, as in a stack of blocks.
    def stack(x, kernel):
      body = jax.checkpoint(lambda x, k: (jnp.tanh(_conv(x, k)), None))
      return jax.lax.scan(body, x, jnp.stack([kernel, kernel]))[0]

    y, dy = jax.jvp(stack, (x, kernel), (dx, dk))
    return y, dy, jax.vjp(stack, x, kernel)[1](out)

  args = (x, kernel, dx, dk, out)
  found = _on_mesh({"fsdp": 2, "sequence": 4}, derivatives, *args)
  # Sums over rows and samples are taken in another order.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
    found,
    jax.jit(derivatives)(*args),
  )


@pytest.mark.parametrize(("rows", "side"), [(6, 3), (4, 5)])
def test_too_few_rows_for_the_devices_are_an_error(rng, rows, side):
  x = rng.normal(size=(1, rows, 4, 2)).astype(np.float32)
  kernel = rng.normal(size=(side, side, 2)).astype(np.float32)
  with pytest.raises(ValueError, match=f"{rows} rows do not divide over seque"):
    _on_mesh({"fsdp": 2, "sequence": 4}, _conv, x, kernel)
