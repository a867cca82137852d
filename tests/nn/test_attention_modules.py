import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sana_jax.nn import attention
from sana_jax.ops import attention as attention_op
from sana_jax.ops import linear_attention as linear_attention_op


def _randomise(module, rng):
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), module
  )


def _rms(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale


def _heads(x, head_dim):
  return x.reshape(*x.shape[:2], -1, head_dim)


def test_self_attention_normalises_the_full_width_before_the_heads(rng):
  module = attention.LinearSelfAttention(
    8, head_dim=4, use_bias=True, qk_norm=True, rngs=nnx.Rngs(0)
  )
  module = _randomise(module, rng)
  x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
  qkv = np.asarray(x) @ np.asarray(module.qkv.kernel[...]) + np.asarray(
    module.qkv.bias[...]
  )
  q, k, v = np.split(qkv, 3, axis=-1)
  q = _rms(q, np.asarray(module.norm_q.scale[...]))
  k = _rms(k, np.asarray(module.norm_k.scale[...]))
  y = linear_attention_op.relu_linear_attention(
    *(_heads(jnp.asarray(z), 4) for z in (q, k, v))
  )
  expected = module.out(y.reshape(x.shape))
  np.testing.assert_allclose(module(x), expected, rtol=1e-4, atol=1e-4)


def test_self_attention_is_equivariant_to_the_order_of_patches(rng):
  module = attention.LinearSelfAttention(
    8, head_dim=4, use_bias=False, qk_norm=False, rngs=nnx.Rngs(0)
  )
  x = jnp.asarray(rng.normal(size=(1, 6, 8)), jnp.float32)
  order = rng.permutation(6)
  # Another order of summation.
  np.testing.assert_allclose(
    module(x[:, order]), module(x)[:, order], rtol=1e-4, atol=1e-5
  )


def test_cross_attention_splits_keys_and_values_and_norms_keys(rng):
  module = attention.CrossAttention(
    8, head_dim=4, qk_norm=True, rngs=nnx.Rngs(0)
  )
  module = _randomise(module, rng)
  x = jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)
  text = jnp.asarray(rng.normal(size=(2, 3, 8)), jnp.float32)
  k, v = np.split(np.asarray(module.kv(text)), 2, axis=-1)
  q = _rms(np.asarray(module.q(x)), np.asarray(module.norm_q.scale[...]))
  k = _rms(k, np.asarray(module.norm_k.scale[...]))
  y = attention_op.softmax_attention(
    *(_heads(jnp.asarray(z), 4) for z in (q, k, v))
  )
  expected = module.out(y.reshape(x.shape))
  np.testing.assert_allclose(
    module(x, text, None), expected, rtol=1e-4, atol=1e-4
  )


def test_masked_text_changes_nothing(rng):
  module = attention.CrossAttention(
    8, head_dim=4, qk_norm=False, rngs=nnx.Rngs(0)
  )
  x = jnp.asarray(rng.normal(size=(1, 5, 8)), jnp.float32)
  text = jnp.asarray(rng.normal(size=(1, 4, 8)), jnp.float32)
  mask = jnp.array([[True, False, True, False]])
  other = jnp.where(mask[..., None], text, 1e3)
  np.testing.assert_array_equal(module(x, text, mask), module(x, other, mask))


def test_the_float16_limit_reproduces_a_float16_run(rng):
  options = {"head_dim": 4, "use_bias": False, "qk_norm": False}
  free = attention.LinearSelfAttention(8, **options, rngs=nnx.Rngs(0))
  free = _randomise(free, rng)
  free.out.kernel[...] *= 20
  limited = attention.LinearSelfAttention(
    8, **options, fp16_clamp=True, rngs=nnx.Rngs(0)
  )
  limited = jax.tree.unflatten(
    jax.tree.structure(limited), jax.tree.leaves(free)
  )
  x = jnp.asarray(rng.normal(size=(2, 5, 8)) * 1e3, jnp.float32)
  # What float16 hardware does: the product is rounded, which overflows to
  # infinity, and the clip makes the largest number of that.
  qkv = np.asarray(x @ free.qkv.kernel[...])
  heads = (_heads(jnp.asarray(z), 4) for z in np.split(qkv, 3, axis=-1))
  y = np.asarray(linear_attention_op.relu_linear_attention(*heads))
  y = y.reshape(x.shape).astype(np.float16).astype(np.float64)
  y = y @ np.asarray(free.out.kernel[...], np.float64) + np.asarray(
    free.out.bias[...], np.float64
  )
  with np.errstate(over="ignore"):
    emulated = np.clip(y.astype(np.float16), -65504, 65504)
  assert (np.abs(emulated) == 65504).sum() > 5
  assert (np.abs(emulated) < 65504).sum() > 5
  # 11 bits of mantissa, twice, and sums of eight products that may cancel.
  tolerance = {"rtol": 2e-3, "atol": 300}
  np.testing.assert_allclose(limited(x), emulated, **tolerance)
  assert np.abs(np.asarray(free(x)) - emulated).max() > 1e4


def test_the_float16_limit_is_exact_in_bfloat16_too(rng):
  module = attention.LinearSelfAttention(
    8,
    head_dim=4,
    use_bias=False,
    qk_norm=False,
    fp16_clamp=True,
    dtype=jnp.bfloat16,
    rngs=nnx.Rngs(0),
  )
  x = jnp.asarray(rng.normal(size=(1, 5, 8)) * 1e7, jnp.float32)
  assert np.abs(np.asarray(module(x))).max() == 65504
