import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sana_jax.nn import mix_ffn
from sana_jax.ops import depthwise_conv as depthwise_conv_op


def _silu(x):
  return x / (1 + np.exp(-x))


def test_mix_ffn_gates_its_first_half_with_the_second(rng):
  ffn = mix_ffn.MixFFN(4, 6, rngs=nnx.Rngs(0))
  ffn = jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), ffn
  )
  x = jnp.asarray(rng.normal(size=(2, 3, 5, 4)), jnp.float32)
  y = _silu(np.asarray(ffn.inverted(x)))
  y = jnp.asarray(y)
  y = np.asarray(depthwise_conv_op.depthwise_conv(y, ffn.depth_kernel[...]))
  y = y + np.asarray(ffn.depth_bias[...])
  expected = (y[..., :6] * _silu(y[..., 6:])) @ np.asarray(
    ffn.point.kernel[...]
  )
  # float32 sums of about ten terms of size ten.
  np.testing.assert_allclose(ffn(x), expected, rtol=1e-4, atol=1e-3)


def test_mix_ffn_sees_three_by_three_patches(rng):
  ffn = mix_ffn.MixFFN(4, 6, rngs=nnx.Rngs(0))
  x = jnp.asarray(rng.normal(size=(1, 5, 5, 4)), jnp.float32)
  moved = x.at[0, 2, 2].add(1)
  changed = np.abs(ffn(x) - ffn(moved)).max(axis=(0, 3)) > 0
  expected = np.zeros((5, 5), bool)
  expected[1:4, 1:4] = True
  np.testing.assert_array_equal(changed, expected)


def test_mix_ffn_computes_in_its_dtype(rng):
  ffn = mix_ffn.MixFFN(4, 6, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  x = jnp.asarray(rng.normal(size=(1, 3, 3, 4)), jnp.float32)
  assert ffn(x).dtype == jnp.bfloat16
