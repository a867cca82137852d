"""Depthwise convolutions by kernel: the same numbers, the same derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sana_jax import sharding
from sana_jax.ops import gated_conv as gated_conv_op
from sana_jax.ops.gated_conv import pallas_tpu, reference, sharded


@pytest.fixture
def interpreted():
  """Runs TPU kernels on the CPU, in memory that holds NaN at first."""
  params = pltpu.InterpretParams(uninitialized_memory="nan")
  with pltpu.force_tpu_interpret_mode(params):
    yield


def _silu(x):
  return x / (1 + np.exp(-x))


def _filter(x, kernel):
  """Filters in float64, a shifted copy at a time."""
  kh, kw, _ = kernel.shape
  rows, columns = kh // 2, kw // 2
  x = np.asarray(x, np.float64)
  padded = np.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
  h, w = x.shape[1:3]
  return sum(
    padded[:, i : i + h, j : j + w] * np.asarray(kernel[i, j], np.float64)
    for i in range(kh)
    for j in range(kw)
  )


def _expected(inputs, kernel, bias):
  x = np.concatenate([np.asarray(x, np.float64) for x in inputs], axis=-1)
  kernel = np.asarray(kernel, np.float64).reshape(*kernel.shape[:2], -1)
  y = _filter(_silu(x), kernel) + np.asarray(bias, np.float64).reshape(-1)
  value, gate = np.split(y, 2, axis=-1)
  return value * _silu(gate)


def _arguments(rng, shape, *, parts=1, side=3, dtype=jnp.float32):
  *picture, channels = shape
  x = rng.normal(size=(*picture, 2 * channels))
  kernel = rng.normal(size=(side, side, 2, channels)) / side
  bias = rng.normal(size=(2, channels))
  inputs = tuple(jnp.asarray(x, dtype) for x in np.split(x, parts, axis=-1))
  return inputs, jnp.asarray(kernel, dtype), jnp.asarray(bias, dtype)


def _check(out, expected, dtype):
  scale = np.abs(expected).max()
  tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
  np.testing.assert_allclose(
    np.asarray(out, np.float64), expected, rtol=0, atol=tolerance * scale
  )


# Ragged: no multiple of eight tokens, of a width, or of 128 channels.
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ("shape", "parts", "side"),
  [
    ((2, 4, 8, 128), 1, 3),
    ((2, 5, 7, 40), 1, 3),
    ((1, 9, 15, 200), 1, 3),
    ((1, 3, 5, 132), 2, 3),
    ((1, 6, 1, 24), 1, 3),
    ((1, 7, 9, 24), 2, 5),
  ],
)
@pytest.mark.usefixtures("interpreted")
def test_the_kernel_equals_the_formula_in_float64(
  rng, shape, parts, side, dtype
):
  args = _arguments(rng, shape, parts=parts, side=side, dtype=dtype)
  out = gated_conv_op.gated_conv(*args, implementation="pallas_tpu")
  assert out.dtype == dtype
  _check(out, _expected(*args), dtype)


@pytest.mark.parametrize("rows", [17, 32])
@pytest.mark.usefixtures("interpreted")
def test_several_blocks_of_tokens_change_nothing(rng, rows):
  inputs, kernel, bias = _arguments(rng, (1, rows, 24, 12))
  out = pallas_tpu.gated_conv(
    *(inputs * 2), jnp.moveaxis(kernel, 2, 0), bias, gate_start=12, block=128
  )
  _check(out, _expected(inputs, kernel, bias), jnp.float32)


@pytest.mark.usefixtures("interpreted")
def test_several_blocks_of_channels_change_nothing(rng):
  args = _arguments(rng, (1, 2, 4, 5 * 128 + 72))
  out = gated_conv_op.gated_conv(*args, implementation="pallas_tpu")
  _check(out, _expected(*args), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  ("shape", "side", "block"),
  [
    ((2, 6, 9, 40), 5, None),
    ((1, 20, 16, 8), 5, 128),
    ((1, 4, 8, 264), 3, 128),
  ],
)
@pytest.mark.usefixtures("interpreted")
def test_the_plain_kernel_equals_the_formula(rng, shape, side, block, dtype):
  x = jnp.asarray(rng.normal(size=shape), dtype)
  kernel = jnp.asarray(rng.normal(size=(side, side, shape[-1])), dtype)
  out = pallas_tpu.conv(x, kernel, block=block)
  _check(out, _filter(x, np.asarray(kernel, np.float64)), dtype)
  named = gated_conv_op.depthwise_conv(x, kernel, implementation="pallas_tpu")
  np.testing.assert_array_equal(named, out)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_definition_equals_the_formula(rng, parts):
  args = _arguments(rng, (2, 4, 6, 5), parts=parts)
  for implementation in (None, "xla"):
    out = gated_conv_op.gated_conv(*args, implementation=implementation)
    _check(out, _expected(*args), jnp.float32)


def _derivatives(implementation, args, tangents, cotangent):
  """Returns first and second derivatives, forward and reverse."""
  function = functools.partial(
    gated_conv_op.gated_conv, implementation=implementation
  )

  def forward(*args):
    return jax.jvp(function, args, tangents)[1]

  def reverse(*args):
    return jax.vjp(function, *args)[1](cotangent)

  return (
    function(*args),
    forward(*args),
    reverse(*args),
    jax.jvp(reverse, args, tangents)[1],
    jax.vjp(forward, *args)[1](cotangent),
  )


def _check_derivatives(rng, implementation):
  args = _arguments(rng, (1, 3, 4, 5))
  tangents = _arguments(rng, (1, 3, 4, 5))
  cotangent = jnp.asarray(rng.normal(size=(1, 3, 4, 5)), jnp.float32)
  found, expected = (
    jax.jit(functools.partial(_derivatives, name))(args, tangents, cotangent)
    for name in (implementation, "xla")
  )
  jax.tree.map(
    lambda a, b: _check(a, np.asarray(b, np.float64), jnp.float32),
    found,
    expected,
  )


@pytest.mark.usefixtures("interpreted")
def test_the_kernel_has_all_derivatives(rng):
  _check_derivatives(rng, "pallas_tpu")


def test_what_is_chosen_when_lowering_has_all_derivatives(rng):
  _check_derivatives(rng, None)


@pytest.mark.usefixtures("interpreted")
def test_the_gradient_is_the_slope_of_the_kernel(rng):
  args = _arguments(rng, (1, 3, 4, 5))
  steps = _arguments(rng, (1, 3, 4, 5))
  function = functools.partial(
    gated_conv_op.gated_conv, implementation="pallas_tpu"
  )
  slope = jax.jvp(function, args, steps)[1]
  moved = [
    jax.tree.map(lambda x, s, sign=sign: x + sign * 1e-2 * s, args, steps)
    for sign in (1, -1)
  ]
  above, below = (np.asarray(function(*args), np.float64) for args in moved)
  # Central differences of float32: rounding, and the third derivative.
  np.testing.assert_allclose((above - below) / 2e-2, slope, atol=2e-2)


@pytest.mark.usefixtures("interpreted")
def test_the_kernel_works_under_vmap_scan_and_remat(rng):
  inputs, kernel, bias = _arguments(rng, (3, 2, 4, 8))

  def one(implementation, x, kernel):
    return gated_conv_op.gated_conv(
      (x,), kernel, bias, implementation=implementation
    )

  def run(implementation):
    function = functools.partial(one, implementation)
    mapped = jax.vmap(lambda x: function(x[None], kernel)[0])(inputs[0])
    both = jax.vmap(function)(inputs[0][:, None], jnp.stack([kernel] * 3))

    def body(x, kernel):
      y = function(x, kernel)
      return jnp.concatenate([y, y], axis=-1), None

    def stack(kernels):
      step = jax.checkpoint(body)
      return jnp.sum(jnp.sin(jax.lax.scan(step, inputs[0], kernels)[0]))

    return mapped, both, jax.grad(stack)(jnp.stack([kernel, 2 * kernel]))

  jax.tree.map(
    lambda a, b: _check(a, np.asarray(b, np.float64), jnp.float32),
    jax.jit(functools.partial(run, "pallas_tpu"))(),
    jax.jit(functools.partial(run, "xla"))(),
  )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(
  "sizes",
  [
    {"data": 2, "sequence": 4},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
    {"data": 8},
  ],
)
def test_parts_of_a_mesh_are_computed_one_by_one(rng, sizes, parts):
  # Two samples on eight devices are computed by all of them. The interpreter of
  # kernels would want a thread for each device: XLA's form takes its place.
  args = _arguments(rng, (2, 8, 3, 8), parts=parts)
  mesh = sharding.make_mesh(sizes)

  def run(*args):
    with sharding.use(mesh):
      return sharded.run(reference.gated_conv, *args)

  placed = jax.device_put(args, sharding.replicated(mesh))
  _check(jax.jit(run)(*placed), _expected(*args), jnp.float32)


def test_what_cannot_be_is_refused(rng):
  inputs, kernel, bias = _arguments(rng, (1, 2, 3, 4))
  with pytest.raises(ValueError, match=r"\(8,\) channels do not fit .*\(6,\)"):
    gated_conv_op.gated_conv(inputs, kernel[..., :3], bias[:, :3])
  with pytest.raises(ValueError, match="sides must be odd"):
    gated_conv_op.gated_conv(inputs, kernel[:2], bias)
  with pytest.raises(ValueError, match="one of .* got 'cuda'"):
    gated_conv_op.gated_conv(inputs, kernel, bias, implementation="cuda")
  halves = jax.tree.map(lambda x: x.astype(jnp.float16), (inputs, kernel, bias))
  with pytest.raises(NotImplementedError, match="float32 or bfloat16, got"):
    gated_conv_op.gated_conv(*halves, implementation="pallas_tpu")
  assert gated_conv_op.gated_conv(*halves).dtype == jnp.float16
  wide = jax.ShapeDtypeStruct((1, 4, 2**14, 8), jnp.float32)
  taps = jax.ShapeDtypeStruct((5, 5, 8), jnp.float32)
  named = functools.partial(
    gated_conv_op.depthwise_conv, implementation="pallas_tpu"
  )
  with pytest.raises(NotImplementedError, match="rows of 16384 .* memory"):
    jax.eval_shape(named, wide, taps)
