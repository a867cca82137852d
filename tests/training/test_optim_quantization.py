"""Arrays of 8 bits."""

import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.training.optim import quantization


@pytest.mark.parametrize(
  ("shape", "axis", "blocks"),
  [
    ((3, 4096), -1, (3, 2)),
    ((4100, 5), -2, (3, 5)),
    ((2, 6720, 3), 1, (2, 4, 3)),
    ((7,), 0, (1,)),
  ],
)
def test_the_round_trip_errs_by_half_a_quantum_of_its_block(
  rng, shape, axis, blocks
):
  # Blocks of very different sizes must not share a quantum.
  x = rng.normal(size=shape) * 10 ** rng.uniform(-3, 3, size=shape)
  x = jnp.asarray(x, jnp.float32)
  packed = quantization.quantize(x, axis)
  assert packed.codes.dtype == jnp.uint8
  assert packed.codes.shape == shape
  assert packed.scale.shape == packed.minimum.shape == blocks
  error = np.abs(np.asarray(quantization.dequantize(packed, axis) - x))
  length, count = shape[axis], blocks[axis]
  quantum = np.repeat(np.asarray(packed.scale), -(-length // count), axis=axis)
  quantum = np.take(quantum, np.arange(length), axis=axis)
  largest = np.abs(np.asarray(x)).max()
  # Float32 roundings of the values themselves come on top.
  assert (error <= 0.5001 * quantum + 1e-6 * largest).all()
  assert error.max() > 0


def test_a_block_has_no_more_elements_than_it_says(rng):
  x = jnp.asarray(rng.normal(size=(2049, 2)), jnp.float32)
  packed = quantization.quantize(x, 0)
  halves = np.asarray(x[:1025]), np.asarray(x[1025:])
  for number, half in enumerate(halves):
    assert len(half) <= quantization.BLOCK_SIZE
    np.testing.assert_array_equal(packed.minimum[number], half.min(0))
    np.testing.assert_allclose(
      packed.scale[number], (half.max(0) - half.min(0)) / 255, rtol=1e-6
    )


def test_a_block_of_equal_values_is_exact():
  x = jnp.full((3, 5), 0.37, jnp.float32)
  packed = quantization.quantize(x, -1)
  np.testing.assert_array_equal(packed.scale, np.zeros((3, 1)))
  np.testing.assert_array_equal(quantization.dequantize(packed, -1), x)


def test_the_least_and_the_largest_are_kept(rng):
  x = jnp.asarray(rng.normal(size=(4, 100)), jnp.float32)
  again = quantization.dequantize(quantization.quantize(x, -1), -1)
  np.testing.assert_array_equal(again.min(1), x.min(1))
  np.testing.assert_allclose(again.max(1), x.max(1), rtol=1e-6)
