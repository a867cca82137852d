"""The kernels compile for TPUs that need not be there."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sana_jax import sharding
from sana_jax.nn import mix_ffn
from sana_jax.ops import gated_conv as gated_conv_op
from sana_jax.plan import topology

pytestmark = pytest.mark.tpu_aot

CHIPS = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2")


@pytest.fixture(autouse=True)
def _compiler():
  pytest.importorskip("libtpu")


def _arrays(chip, *shapes):
  place = NamedSharding(topology.one_chip(chip), PartitionSpec())
  return [
    jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    for shape in shapes
  ]


def _kernels(function, *args) -> int:
  text = jax.jit(function).lower(*args).compile().as_text()
  return text.count('custom_call_target="tpu_custom_call"')


# Squares and the longest pictures of 512 to 4096 pixels; a width that is a
# multiple of nothing; the autoencoder's; a channel count of the 0.6B.
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
  ("height", "width", "channels"),
  [
    *((16, 16, 5600), (8, 32, 5600), (17, 15, 5600), (9, 26, 5600)),
    *((32, 32, 5600), (16, 64, 5600), (32, 32, 2880), (38, 26, 5600)),
    *((64, 64, 5600), (128, 32, 5600), (128, 128, 5600), (64, 256, 5600)),
    *((256, 64, 5600), (32, 32, 4096), (128, 128, 2048), (512, 512, 2048)),
  ],
)
def test_the_gated_kernel_compiles(chip, height, width, channels):
  x, kernel, bias = _arrays(
    chip,
    (2, height, width, 2 * channels),
    (3, 3, 2, channels),
    (2, channels),
  )
  run = lambda *args: gated_conv_op.gated_conv((args[0],), *args[1:])  # noqa: E731
  assert _kernels(run, x, kernel, bias) == 1


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
  ("side", "channels"), [(32, 3072), (128, 3072), (128, 1536), (512, 1536)]
)
def test_the_plain_kernel_compiles(chip, side, channels):
  args = _arrays(chip, (1, side, side, channels), (5, 5, channels))
  assert _kernels(gated_conv_op.depthwise_conv, *args) == 1


@pytest.mark.parametrize(
  ("sizes", "exchanges"),
  [
    ({"data": 2, "sequence": 2}, 2),
    ({"fsdp": 2, "tensor": 2}, 0),
    ({"data": 4}, 0),
  ],
)
def test_the_kernel_runs_on_each_part_of_a_mesh(sizes, exchanges):
  devices = list(topology.describe("v5e:2x2").devices)
  mesh = sharding.make_mesh(sizes, devices)
  model = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding.replicated(mesh)
    ),
    jax.eval_shape(
      lambda: mix_ffn.MixFFN(
        256, 640, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)
      )
    ),
  )
  x = jax.ShapeDtypeStruct(
    (4, 8, 6, 256),
    jnp.bfloat16,
    sharding=sharding.batch_sharding(mesh, ("batch", "rows")),
  )

  def run(model, x):
    with sharding.use(mesh):
      return model(x)

  text = jax.jit(run).lower(model, x).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 1
  starts = text.count(" collective-permute-start(")
  assert starts + text.count(" collective-permute(") == exchanges
