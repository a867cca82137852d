import jax.numpy as jnp
import numpy as np

from sana_jax.ops import attention as attention_op


def _attend(q, k, v, *, mask=None, **options):
  mask = None if mask is None else jnp.asarray(mask)
  q, k, v = map(jnp.asarray, (q, k, v))
  return attention_op.softmax_attention(q, k, v, mask=mask, **options)


def _loop(q, k, v, mask, scale, softcap):
  out = np.zeros(q.shape)
  group = q.shape[2] // k.shape[2]
  for b, n, h in np.ndindex(*q.shape[:3]):
    logits = scale * k[b, :, h // group] @ q[b, n, h]
    if softcap is not None:
      logits = softcap * np.tanh(logits / softcap)
    weights = np.exp(logits - logits.max()) * mask[b, n]
    out[b, n, h] = weights @ v[b, :, h // group] / weights.sum()
  return out


def _inputs(rng, heads=4, kv_heads=4):
  q = rng.normal(size=(2, 3, heads, 8)).astype(np.float32)
  k, v = rng.normal(size=(2, 2, 5, kv_heads, 8)).astype(np.float32)
  return q, k, v


def test_softmax_attention_equals_the_written_out_loop(rng):
  q, k, v = _inputs(rng, heads=4, kv_heads=2)
  mask = rng.random((2, 3, 5)) < 0.6
  mask[..., 0] = True
  out = _attend(q, k, v, mask=mask, scale=1.7, softcap=2.0)
  expected = _loop(q, k, v, mask, 1.7, 2.0)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)  # float32


def test_softmax_attention_scales_by_the_head_dimension_by_default(rng):
  q, k, v = _inputs(rng)
  out = _attend(q, k, v)
  expected = _loop(q, k, v, np.ones((2, 3, 5)), 8**-0.5, None)
  np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)  # float32


def test_masking_a_key_is_the_same_as_removing_it(rng):
  q, k, v = _inputs(rng)
  keep = np.array([True, False, True, True, False])
  mask = jnp.broadcast_to(keep, (2, 1, 5))
  out = _attend(q, k, v, mask=mask)
  removed = _attend(q, k[:, keep], v[:, keep])
  np.testing.assert_allclose(out, removed, rtol=1e-6, atol=1e-7)  # reordering


def test_a_row_without_any_kept_key_is_the_plain_average_and_not_nan(rng):
  q, k, v = _inputs(rng)
  out = _attend(q, k, v, mask=np.zeros((2, 1, 5), bool))
  expected = np.broadcast_to(v.mean(axis=1, keepdims=True), out.shape)
  np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)  # float32


def test_the_soft_cap_bounds_the_logits_but_keeps_small_ones(rng):
  q, k, v = _inputs(rng)
  plain = _attend(q, k, v)
  np.testing.assert_allclose(
    _attend(q, k, v, softcap=1e4), plain, rtol=1e-4, atol=1e-5
  )
  # Capped to +-0.01 every key weighs the same, within exp(0.02).
  flat = _attend(1e3 * q, k, v, softcap=0.01)
  mean = np.broadcast_to(v.mean(axis=1, keepdims=True), flat.shape)
  np.testing.assert_allclose(flat, mean, atol=0.05)


def test_softmax_attention_returns_the_dtype_of_the_values(rng):
  q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in _inputs(rng))
  assert _attend(q, k, v).dtype == jnp.bfloat16
