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
