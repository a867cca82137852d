import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.ops import last_axis

FORMS = (last_axis._by_sum, last_axis._by_product)


@pytest.mark.parametrize("form", FORMS)
def test_float32_is_summed_as_float32(rng, form):
  x = rng.normal(3, 2, size=(2, 5, 300)).astype(np.float32)
  expected = x.astype(np.float64).sum(axis=-1, keepdims=True)
  np.testing.assert_allclose(form(jnp.asarray(x)), expected, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_sums_of_bfloat16_are_float32(form):
  # In bfloat16, 256 + 1 is 256.
  x = jnp.ones((3, 1000), jnp.bfloat16)
  found = form(x)
  assert found.dtype == jnp.float32
  assert (found == 1000).all()


def test_the_mean_is_the_sum_over_the_size(rng):
  x = rng.normal(size=(4, 7)).astype(np.float32)
  expected = x.astype(np.float64).mean(axis=-1, keepdims=True)
  np.testing.assert_allclose(
    last_axis.mean(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6
  )


def test_derivatives_of_any_order_are_those_of_a_sum(rng):
  x, t = (jnp.asarray(rng.normal(size=(2, 6)), jnp.float32) for _ in range(2))

  def loss(total, x):
    return (total(jnp.square(x)) ** 2).sum()

  ours, plain = (
    functools.partial(loss, total)
    for total in (last_axis.total, last_axis._by_sum)
  )
  for order in (
    lambda f: jax.grad(f)(x),
    lambda f: jax.jvp(f, (x,), (t,))[1],
    lambda f: jax.jvp(jax.grad(f), (x,), (t,))[1],
    lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (t,))[1])(x),
  ):
    np.testing.assert_allclose(order(ours), order(plain), rtol=1e-5)


def test_it_may_be_mapped(rng):
  x = jnp.asarray(rng.normal(size=(3, 2, 5)), jnp.float32)
  np.testing.assert_array_equal(
    jax.vmap(last_axis.total)(x), last_axis.total(x)
  )


@pytest.mark.parametrize(("platform", "by_product"), [("tpu", 1), ("cpu", 0)])
def test_a_product_is_what_a_tpu_is_given(platform, by_product):
  x = jax.ShapeDtypeStruct((2, 6), jnp.float32)
  traced = jax.jit(last_axis.total).trace(x)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  assert text.count("precision = [HIGHEST, HIGHEST]") == by_product
  assert text.count("stablehlo.reduce(") == 1 - by_product
