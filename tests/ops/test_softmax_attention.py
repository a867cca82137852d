import functools

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest

from sana_jax.ops import attention as attention_op
from sana_jax.ops.attention import cudnn, xla


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


def _masked(rng):
  """Returns a mask with a row that keeps nothing."""
  mask = rng.random((2, 1, 5)) < 0.6
  mask[0, 0], mask[1, 0, 0] = False, True
  return jnp.asarray(mask)


def test_softmax_attention_is_differentiated_both_ways_twice(rng):
  q, k, v = map(jnp.asarray, _inputs(rng))
  attend = functools.partial(attention_op.softmax_attention, mask=_masked(rng))
  jax.test_util.check_grads(
    attend, (q, k, v), order=2, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2
  )


@pytest.fixture
def library(monkeypatch):
  """Puts XLA's form in the place of cuDNN, differentiable once, in reverse."""
  calls = []

  @functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
  def attend(q, k, v, mask, scale):
    calls.append(q.shape)
    return xla.attend(q, k, v, mask=mask, scale=scale, softcap=None)

  def refuse(*args):
    raise AssertionError("the library's own rule is used")

  attend.defvjp(refuse, refuse)
  monkeypatch.setattr(cudnn, "unsupported", lambda *_, **__: None)
  monkeypatch.setattr(
    cudnn, "attend", lambda q, k, v, mask, scale: attend(q, k, v, mask, scale)
  )
  return calls


@pytest.mark.parametrize("masked", [False, True])
def test_a_library_without_forward_rules_is_differentiated_by_xla(
  rng, library, masked
):
  args = tuple(map(jnp.asarray, _inputs(rng)))
  tangents = tuple(map(jnp.asarray, _inputs(rng)))
  mask = _masked(rng) if masked else None

  def second_order(implementation):
    def loss(q, k, v):
      # Twice, under what blocks are run with.
      def layer(q, _):
        return attention_op.softmax_attention(
          q, k, v, mask=mask, implementation=implementation
        ), None

      q, _ = jax.lax.scan(jax.checkpoint(layer), q, length=2)
      return (q**2).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    return jax.jit(lambda a, t: jax.jvp(gradient, a, t))(args, tangents)

  found = second_order("cudnn")
  assert library
  jax.tree.map(
    # float32, sums in another order
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
    found,
    second_order("xla"),
  )


def test_a_library_works_under_vmap(rng, library):
  q, k, v = (jnp.asarray(x)[:, None] for x in _inputs(rng))
  attend = functools.partial(
    attention_op.softmax_attention, implementation="cudnn"
  )
  out = jax.vmap(attend)(q, k, v)
  expected = _attend(q[:, 0], k[:, 0], v[:, 0])
  np.testing.assert_allclose(out[:, 0], expected, rtol=1e-6, atol=1e-6)
  assert library


@pytest.mark.parametrize(
  ("dtype", "options", "message"),
  [
    ("float32", {}, "must be bfloat16, got float32, float32, float32"),
    ("bfloat16", {"softcap": 50.0}, "no soft-cap, got 50.0"),
    ("bfloat16", {}, "it needs a GPU, and JAX runs on cpu here"),
  ],
)
def test_cudnn_says_what_it_cannot_do(rng, dtype, options, message):
  if jax.default_backend() != "cpu":
    pytest.skip("there is more than a CPU")
  args = (jnp.asarray(x, dtype) for x in _inputs(rng))
  with pytest.raises(NotImplementedError, match=message):
    attention_op.softmax_attention(*args, implementation="cudnn", **options)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("head_dim", [72, 112])
def test_cudnn_agrees_with_xla(rng, head_dim):
  q = jnp.asarray(rng.normal(size=(2, 64, 4, head_dim)), jnp.bfloat16)
  k, v = jnp.asarray(rng.normal(size=(2, 2, 30, 4, head_dim)), jnp.bfloat16)
  mask = jnp.arange(30) < jnp.array([[[0]], [[17]]])
  ours = attention_op.softmax_attention(
    q, k, v, mask=mask, implementation="cudnn"
  )
  expected = attention_op.softmax_attention(q, k, v, mask=mask)
  np.testing.assert_allclose(
    *(np.asarray(x, np.float32) for x in (ours, expected)), rtol=2e-2, atol=2e-2
  )


def test_an_unknown_implementation_is_refused(rng):
  with pytest.raises(ValueError, match=r"\('xla', 'cudnn'\), got 'flash'"):
    _attend(*_inputs(rng), implementation="flash")
