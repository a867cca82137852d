import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax.nn import layers, low_rank


def _normal(rng, *shape):
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def test_the_update_is_added_to_the_linear_layer(rng):
  linear = layers.Linear(5, 4, rngs=nnx.Rngs(0))
  x, down, up = _normal(rng, 3, 5), _normal(rng, 5, 2), _normal(rng, 2, 4)
  layer = low_rank.LowRankLinear(linear, down, up)
  expected = x @ (linear.kernel[...] + down @ up) + linear.bias[...][None]
  np.testing.assert_allclose(layer(x), expected, atol=1e-5)  # float32 sums


def test_a_second_update_joins_the_first(rng):
  linear = layers.Linear(5, 4, use_bias=False, rngs=nnx.Rngs(0))
  x = _normal(rng, 3, 5)
  layer, expected = linear, linear(x)
  for rank in (2, 3):
    down, up = _normal(rng, 5, rank), _normal(rng, rank, 4)
    layer = low_rank.LowRankLinear(layer, down, up)
    expected += x @ down @ up
  assert layer.down[...].shape == (5, 5)
  np.testing.assert_allclose(layer(x), expected, atol=1e-5)  # float32 sums


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_computes_in_the_dtype_of_the_linear_layer(rng, dtype):
  linear = layers.Linear(5, 4, dtype=dtype, rngs=nnx.Rngs(0))
  layer = low_rank.LowRankLinear(linear, _normal(rng, 5, 2), _normal(rng, 2, 4))
  assert layer(_normal(rng, 3, 5)).dtype == dtype
  assert jax.eval_shape(layer, jnp.ones((2, 3, 5))).shape == (2, 3, 4)
