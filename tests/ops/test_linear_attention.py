import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from sana_jax import sharding
from sana_jax.ops import linear_attention as linear_attention_op
from sana_jax.ops.linear_attention import reference
from sana_jax.plan import topology


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
  assert out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out.astype(jnp.float32), 3.0)
  large = 100 * jnp.ones((1, 64, 1, 8), jnp.float16)
  out = _attend(large, large, large)
  assert out.dtype == jnp.float16
  np.testing.assert_array_equal(out.astype(jnp.float32), 100.0)


# Ragged on purpose: tokens that no block divides, and a last group of lanes
# that heads do not fill.
SHAPES = [(2, 11, 6, 32), (1, 1100, 2, 16), (1, 5, 3, 64)]
POISONED = pltpu.InterpretParams(uninitialized_memory="nan")
RUNS = {
  "xla": {"implementation": "xla"},
  "pallas_tpu": {"implementation": "pallas_tpu", "interpret": POISONED},
  "pallas_gpu": {"implementation": "pallas_gpu", "interpret": True},
}
runs = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


def _exact(q, k, v):
  """Attends in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  q, k = np.maximum(q, 0), np.maximum(k, 0)
  total = np.einsum("bnhk,bmhk,bmhv->bnhv", q, k, v, optimize=True)
  return total / (np.einsum("bnhk,bhk->bnh", q, k.sum(1))[..., None] + 1e-15)


def _random(rng, shape, dtype=jnp.float32, count=3):
  return [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(count)]


@runs
@pytest.mark.parametrize(
  ("shape", "dtype", "tolerance"),
  [(shape, jnp.float32, 1e-5) for shape in SHAPES]
  + [(SHAPES[1], jnp.bfloat16, 2e-2)],
)
def test_every_implementation_equals_float64(rng, run, shape, dtype, tolerance):
  args = _random(rng, shape, dtype)
  out = linear_attention_op.relu_linear_attention(*args, **run)
  assert out.dtype == dtype
  expected = _exact(*args)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(
    np.asarray(out, np.float64), expected, atol=tolerance * scale
  )


def test_the_definition_equals_float64(rng):
  args = _random(rng, SHAPES[0])
  out = reference.attend(*args, eps=1e-15)
  np.testing.assert_allclose(out, _exact(*args), atol=1e-5)


# Poisoning has effects, which rematerialisation refuses: plain interpreting.
@pytest.mark.parametrize("name", RUNS)
def test_every_implementation_has_derivatives_of_any_order(rng, name):
  shape = (1, 7, 3, 16)
  args, tangents = (tuple(_random(rng, shape)) for _ in range(2))

  def derivatives(attend):
    def loss(*args):
      return jnp.sum(jnp.sin(attend(*args)))

    gradient = jax.grad(loss, (0, 1, 2))

    def directional(*args):
      return jax.jvp(loss, args, tangents)[1]

    def scanned(q):
      step = jax.checkpoint(lambda c, _: (attend(c, *args[1:]), None))
      return jnp.sum(jax.lax.scan(step, q, None, length=2)[0] ** 2)

    return {
      "jvp": jax.jvp(attend, args, tangents),
      "grad": gradient(*args),
      "jvp of grad": jax.jvp(gradient, args, tangents)[1],
      "grad of jvp": jax.grad(directional, (0, 1, 2))(*args),
      "grad of scan": jax.grad(scanned)(args[0]),
      "vmap": jax.vmap(attend)(*(jnp.stack([x, 2 * x]) for x in args)),
    }

  found = jax.jit(
    lambda: derivatives(
      functools.partial(
        linear_attention_op.relu_linear_attention,
        implementation=name,
        interpret=name != "xla",
      )
    )
  )()
  expected = jax.jit(
    lambda: derivatives(functools.partial(reference.attend, eps=1e-15))
  )()

  def close(found, expected):
    # Relative to the largest: quotients of small normalisers are large.
    limit = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=limit)

  jax.tree.map(close, found, expected)


# Interpreting with poisoned memory takes a thread a device, which few cores
# do not have.
@pytest.mark.parametrize("name", RUNS)
def test_tokens_heads_and_samples_on_several_devices_change_nothing(rng, name):
  interpret = name != "xla"
  mesh = sharding.make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})
  args = _random(rng, (2, 14, 6, 16))

  def attend(*args):
    with sharding.use(mesh):
      return linear_attention_op.relu_linear_attention(
        *args, implementation=name, interpret=interpret
      )

  placed = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec("fsdp", "sequence", "tensor")
  )
  compiled = jax.jit(attend).lower(*jax.device_put(args, placed)).compile()
  out = compiled(*jax.device_put(args, placed))
  np.testing.assert_allclose(out, _exact(*args), atol=1e-5)
  # States are summed; neither tokens nor heads move.
  text = compiled.as_text()
  assert "all-reduce" in text
  assert "all-gather" not in text
  assert "all-to-all" not in text


def test_what_does_not_divide_over_the_mesh_is_whole_on_every_device(rng):
  mesh = sharding.make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2})
  args = _random(rng, (1, 7, 3, 16))

  def attend(*args):
    with sharding.use(mesh):
      return linear_attention_op.relu_linear_attention(
        *args, implementation="pallas_tpu", interpret=True
      )

  args = jax.device_put(args, sharding.replicated(mesh))
  np.testing.assert_allclose(jax.jit(attend)(*args), _exact(*args), atol=1e-5)


def test_many_tokens_may_take_the_kernel_and_are_the_same_on_a_cpu(rng):
  tokens = linear_attention_op.MIN_TOKENS_OF_KERNEL
  args = _random(rng, (1, tokens, 1, 8))

  def loss(implementation, *args):
    out = linear_attention_op.relu_linear_attention(
      *args, implementation=implementation
    )
    return jnp.sum(out**2)

  found, expected = (
    jax.jit(jax.value_and_grad(functools.partial(loss, name)))(*args)
    for name in (None, "xla")
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_unknown_implementation_is_refused(rng):
  with pytest.raises(ValueError, match="None or one of .*, got 'mosaic'"):
    linear_attention_op.relu_linear_attention(
      *_random(rng, SHAPES[0]), implementation="mosaic"
    )


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu"])
def test_a_kernel_on_another_device_is_refused_with_the_reason(rng, name):
  attend = jax.jit(
    functools.partial(
      linear_attention_op.relu_linear_attention, implementation=name
    )
  )
  with pytest.raises(NotImplementedError, match=f"{name} is a kernel for"):
    attend(*_random(rng, SHAPES[0]))


@pytest.mark.parametrize(
  ("name", "shape", "dtype", "reason"),
  [
    ("pallas_tpu", (1, 8, 2, 24), jnp.float32, "head_dim must divide 128"),
    ("pallas_tpu", (1, 8, 2, 32), jnp.float16, "must be float32 or bfloat16"),
    ("pallas_tpu", (1, 8, 512, 32), jnp.float32, "state of 512 heads of 32"),
    ("pallas_gpu", (1, 8, 2, 8), jnp.float32, "head_dim must be one of"),
    ("pallas_gpu", (1, 8, 2, 32), jnp.float16, "must be float32 or bfloat16"),
  ],
)
def test_shapes_that_a_kernel_cannot_do_are_refused(
  rng, name, shape, dtype, reason
):
  with pytest.raises(NotImplementedError, match=reason):
    linear_attention_op.relu_linear_attention(
      *_random(rng, shape, dtype), implementation=name
    )


def _lower(name, mesh, shape, dtype):
  placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  arg = jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
  attend = functools.partial(
    linear_attention_op.relu_linear_attention, implementation=name
  )
  with jax.set_mesh(mesh):
    return jax.jit(attend).lower(arg, arg, arg)


@pytest.mark.tpu_aot
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize(
  "shape",
  [
    *((2, 1024, 70, 32), (2, 16384, 70, 32), (1, 1000, 36, 32)),
    *((1, 16384, 32, 32), (1, 77, 3, 64)),
  ],
)
def test_the_mosaic_kernel_compiles_for_tpus(chip, dtype, shape):
  pytest.importorskip("libtpu")
  mesh = topology.one_chip(chip)
  text = _lower("pallas_tpu", mesh, shape, dtype).compile().as_text()
  assert "tpu_custom_call" in text


@pytest.mark.tpu_aot
def test_on_a_tpu_many_tokens_take_the_kernel_and_few_do_not():
  pytest.importorskip("libtpu")
  mesh = topology.one_chip("v5e:2x2")
  least = linear_attention_op.MIN_TOKENS_OF_KERNEL
  for tokens, taken in ((least - 1, False), (least, True), (16384, True)):
    shape = (1, tokens, 8, 32)
    text = _lower(None, mesh, shape, jnp.bfloat16).compile().as_text()
    assert ("tpu_custom_call" in text) == taken


@pytest.mark.tpu_aot
def test_on_sharded_tokens_the_mosaic_kernel_sums_states_only():
  pytest.importorskip("libtpu")
  devices = np.asarray(topology.describe("v5e:2x2").devices)
  mesh = jax.sharding.Mesh(devices.reshape(2, 2), ("sequence", "tensor"))
  placed = jax.sharding.NamedSharding(
    mesh, jax.sharding.PartitionSpec(None, "sequence", "tensor")
  )
  arg = jax.ShapeDtypeStruct((1, 512, 6, 32), jnp.bfloat16, sharding=placed)

  def attend(*args):
    with sharding.use(mesh):
      return linear_attention_op.relu_linear_attention(
        *args, implementation="pallas_tpu"
      )

  text = jax.jit(attend).lower(arg, arg, arg).compile().as_text()
  assert "tpu_custom_call" in text
  assert "all-reduce" in text
  assert "all-gather" not in text


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["h100:1", "a100:1"])
def test_the_triton_kernel_compiles_for_gpus(chip):
  pytest.importorskip("jax_plugins.xla_cuda13")
  mesh = topology.one_chip(chip)
  lowered = _lower("pallas_gpu", mesh, (2, 1000, 36, 32), jnp.bfloat16)
  text = lowered.compile(dict(topology.compiler_options(mesh))).as_text()
  assert "triton" in text
