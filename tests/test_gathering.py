"""Kernels are gathered where they are used; sums are scattered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sana_jax import sharding
from sana_jax.nn import layers
from sana_jax.sharding import gathering

IN, OUT = ("embed", "heads"), ("heads", "embed")


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_what_is_gathered_is_whole_and_its_gradient_a_share_of_the_sum(
  rng, dim
):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  whole = rng.normal(size=(4, 8, 12)).astype(np.float32)
  weights = rng.normal(size=(8, *whole.shape)).astype(np.float32)
  cut = P(*(None,) * dim, "fsdp")

  def weighed(shard, weight):
    found = sharding.gather_shards(shard, "fsdp", dim)
    return jnp.sum(found * weight[0])[None]

  def total(shards, weights):
    devices = P(("data", "fsdp"))
    sums = jax.shard_map(
      weighed,
      mesh=mesh,
      in_specs=(cut, devices),
      out_specs=devices,
      check_vma=False,
    )(shards, weights)
    return jnp.sum(sums)

  value, gradient = jax.jit(
    jax.value_and_grad(total), out_shardings=(None, NamedSharding(mesh, cut))
  )(whole, weights)
  np.testing.assert_allclose(value, np.sum(whole * weights), rtol=1e-4)
  np.testing.assert_allclose(gradient, weights.sum(0), rtol=1e-4, atol=1e-5)


# Of a prime number, the second step has groups of one.
@pytest.mark.parametrize("count", [2, 6, 7, 8])
def test_gathering_in_two_steps_and_its_gradient_are_those_of_one(rng, count):
  mesh = jax.make_mesh(
    (count,),
    ("fsdp",),
    devices=jax.devices()[:count],
    axis_types=(jax.sharding.AxisType.Auto,),
  )
  shards = rng.normal(size=(count, 3, 5)).astype(np.float32)
  weights = rng.normal(size=(count, *shards.shape)).astype(np.float32)

  def weighed(shard, weight):
    found = gathering._in_two_steps(shard[0], "fsdp")
    return jnp.sum(found * weight[0])[None]

  def total(shards):
    on_mesh = jax.shard_map(
      weighed,
      mesh=mesh,
      in_specs=(P("fsdp"), P("fsdp")),
      out_specs=P("fsdp"),
      check_vma=False,
    )
    return jnp.sum(on_mesh(shards, weights))

  value, gradient = jax.jit(jax.value_and_grad(total))(shards)
  np.testing.assert_allclose(value, np.sum(shards * weights), rtol=1e-4)
  np.testing.assert_allclose(gradient, weights.sum(0), rtol=1e-4, atol=1e-5)


def random(rng, *shape):
  return (rng.normal(size=shape) / 5).astype(np.float32)


@pytest.mark.parametrize(
  "multiply", [layers.product, layers.scattering_product]
)
@pytest.mark.parametrize(
  "axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_a_product_on_a_mesh_has_the_gradients_of_a_plain_one(
  rng, multiply, axes
):
  mesh = sharding.make_mesh(axes)
  x, kernel = random(rng, 8, 3, 16), random(rng, 16, 8)
  place = NamedSharding(mesh, P("fsdp", "tensor"))

  @functools.partial(
    jax.jit, in_shardings=(sharding.batch_sharding(mesh), place)
  )
  def gradients(x, kernel):
    with sharding.use(mesh):
      return jax.grad(lambda x, k: jnp.sum(multiply(x, k, IN) ** 2), (0, 1))(
        x, kernel
      )

  of_x, of_kernel = gradients(x, kernel)
  y = 2 * x @ kernel
  np.testing.assert_allclose(of_x, y @ kernel.T, rtol=1e-4, atol=1e-5)
  expected = np.einsum("bni,bno->io", x, y)
  np.testing.assert_allclose(of_kernel, expected, rtol=1e-4, atol=1e-5)


def two_layers(multiply, kernels, x):
  """A residual network of two products a layer, rematerialised in a scan."""

  def body(x, layer):
    hidden = jnp.tanh(multiply(x, layer[0], IN))
    return x + multiply(hidden, layer[1], OUT), None

  return jnp.sum(jax.lax.scan(jax.checkpoint(body), x, kernels)[0] ** 2)


# On CPUs, exchanges of a program that do not need each other's results may wait
# for ever: not in CI.
@pytest.mark.long
@pytest.mark.parametrize(
  "axes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_a_scattering_product_has_the_derivatives_of_a_plain_one(rng, axes):
  mesh = sharding.make_mesh(axes)
  kernels, tangents = (
    (random(rng, 2, 16, 8), random(rng, 2, 8, 16)) for _ in range(2)
  )
  x = random(rng, 8, 3, 16)

  def derivatives(multiply, kernels, tangents, x):
    loss = functools.partial(two_layers, multiply)
    first = jax.value_and_grad(loss, (0, 1))(kernels, x)
    forward_over_reverse = jax.jvp(
      lambda k: jax.grad(loss)(k, x), (kernels,), (tangents,)
    )
    reverse_over_forward = jax.grad(
      lambda k: jax.jvp(lambda k: loss(k, x), (k,), (tangents,))[1]
    )(kernels)
    many = jax.vmap(jax.grad(lambda x: loss(kernels, x)))(jnp.stack([x, 2 * x]))
    return first, forward_over_reverse, reverse_over_forward, many

  def on_mesh(*args):
    with sharding.use(mesh):
      return derivatives(layers.scattering_product, *args)

  places = tuple(
    NamedSharding(mesh, P(None, *axes))
    for axes in (("fsdp", "tensor"), ("tensor", "fsdp"))
  )
  found = jax.jit(
    on_mesh,
    in_shardings=(places, places, sharding.batch_sharding(mesh)),
  )(kernels, tangents, x)
  plain = functools.partial(derivatives, layers.product)
  expected = jax.jit(plain)(kernels, tangents, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    found,
    expected,
  )


@pytest.mark.parametrize(("samples", "width"), [(3, 8), (8, 6), (3, 6)])
def test_what_does_not_divide_over_the_shards_is_multiplied_all_the_same(
  rng, samples, width
):
  mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
  x = rng.normal(size=(samples, width)).astype(np.float32)
  kernel = rng.normal(size=(width, 5)).astype(np.float32)

  @jax.jit
  def product(x, kernel):
    with sharding.use(mesh):
      return layers.product(x, kernel, ("embed", None))

  np.testing.assert_allclose(product(x, kernel), x @ kernel, rtol=1e-5)
