import jax.numpy as jnp
import numpy as np

from sana_jax.ops import linear_attention as linear_attention_op


def _attend(q, k, v):
  return linear_attention_op.relu_linear_attention(*map(jnp.asarray, (q, k, v)))


def _double_loop(q, k, v):
  q, k = np.maximum(q, 0), np.maximum(k, 0)
  out = np.zeros(v.shape)
  for b, n, h in np.ndindex(*q.shape[:3]):
    weights = [float(k[b, m, h] @ q[b, n, h]) for m in range(k.shape[1])]
    total = sum(w * v[b, m, h] for m, w in enumerate(weights))
    out[b, n, h] = total / (sum(weights) + 1e-15)
  return out


def test_linear_attention_equals_the_written_out_double_loop(rng):
  q, k, v = rng.normal(size=(3, 2, 7, 3, 8)).astype(np.float32)
  out = _attend(q, k, v)
  # float32 sums of 7 tokens.
  np.testing.assert_allclose(out, _double_loop(q, k, v), rtol=1e-4, atol=1e-5)


def test_linear_attention_ignores_the_order_of_keys_and_follows_queries(rng):
  q, k, v = rng.normal(size=(3, 1, 9, 2, 4)).astype(np.float32)
  order = rng.permutation(9)
  out = _attend(q, k, v)
  # Another order of summation.
  np.testing.assert_allclose(
    _attend(q, k[:, order], v[:, order]), out, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    _attend(q[:, order], k, v), out[:, order], rtol=1e-4, atol=1e-5
  )


def test_linear_attention_of_a_silent_query_is_zero(rng):
  q, k, v = rng.normal(size=(3, 1, 5, 1, 4)).astype(np.float32)
  q[0, 2] = -np.abs(q[0, 2])
  out = _attend(q, k, v)
  np.testing.assert_array_equal(out[0, 2], 0)


def test_linear_attention_sums_in_float32_whatever_the_input():
  # In bfloat16 a running sum of ones stops at 256, in float16 the sum of
  # these products overflows; the mean of a constant must stay that constant.
  ones = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
  out = _attend(ones, ones, 3 * ones)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, 3.0, rtol=1e-6)
  large = 100 * jnp.ones((1, 64, 1, 8), jnp.float16)
  out = _attend(large, large, large)
  np.testing.assert_allclose(out, 100.0, rtol=1e-6)
