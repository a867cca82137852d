import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax.nn import layers, stack


def _blocks(depth=3):
  make = lambda key: layers.Linear(4, 4, rngs=nnx.Rngs(key))  # noqa: E731
  return stack.make_blocks(make, jax.random.key(0), depth)


def _run(blocks, x, *, scan=True, remat="none"):
  return stack.run_blocks(
    lambda block, x: jnp.tanh(block(x)), x, blocks, scan=scan, remat=remat
  )


def test_blocks_are_stacked_and_initialised_differently():
  kernel = _blocks().kernel[...]
  assert kernel.shape == (3, 4, 4)
  assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_blocks_run_in_order(rng):
  blocks = _blocks()
  x = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
  expected = x
  for i in range(3):
    block = jax.tree.map(lambda leaf, i=i: leaf[i], blocks)
    expected = jnp.tanh(block(expected))
  for scan in (True, False):
    np.testing.assert_allclose(
      _run(blocks, x, scan=scan), expected, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_remat_changes_memory_and_not_gradients(rng, scan, remat):
  blocks = _blocks()
  x = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)

  def grads(**options):
    return jax.grad(lambda b: _run(b, x, **options).sum())(blocks)

  # Another order of operations.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    grads(scan=scan, remat=remat),
    grads(scan=True, remat="none"),
  )


@pytest.mark.parametrize("scan", [True, False])
def test_offload_keeps_inputs_of_blocks_on_the_host(scan):
  blocks = _blocks()

  def host_values(remat):
    jaxpr = jax.make_jaxpr(
      jax.grad(
        lambda b: _run(b, jnp.ones((2, 4)), scan=scan, remat=remat).sum()
      )
    )(blocks)
    return str(jaxpr).count("<host>")

  assert host_values("offload") > 0
  assert host_values("full") == 0


@pytest.mark.parametrize("scan", [True, False])
def test_per_block_arrays_are_sliced_with_the_blocks(scan):
  blocks = _blocks()
  numbers = jnp.array([1.0, 10.0, 100.0])
  out = stack.run_blocks(
    lambda block, x, number: 2 * x + number,
    jnp.zeros(()),
    blocks,
    numbers,
    scan=scan,
    remat="none",
  )
  assert out == 4 * 1 + 2 * 10 + 100


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_outputs_of_all_blocks_are_collected(scan, remat):
  last, outputs = stack.collect_blocks(
    lambda block, x, number: (2 * x + number, {"before": x}),
    jnp.ones(()),
    _blocks(),
    jnp.array([1.0, 10.0, 100.0]),
    scan=scan,
    remat=remat,
  )
  np.testing.assert_array_equal(outputs["before"], [1.0, 3.0, 16.0])
  assert last == 132


def test_an_unknown_remat_is_an_error():
  with pytest.raises(ValueError, match=r"remat must be one of .* got 'some'"):
    _run(_blocks(), jnp.ones((1, 4)), remat="some")
