import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sana_jax.nn import efficientvit


def _randomised(module, rng):
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), module
  )


def test_scale_branch_mixes_only_within_groups_of_head_dim(rng):
  branch = _randomised(
    efficientvit.ScaleBranch(6, head_dim=2, kernel_size=5, rngs=nnx.Rngs(0)),
    rng,
  )
  x = jnp.asarray(rng.normal(size=(1, 4, 3, 6)), jnp.float32)
  depth = np.asarray(branch.depth_kernel[...])
  point = np.asarray(branch.point_kernel[...])
  padded = np.pad(np.asarray(x), ((0, 0), (2, 2), (2, 2), (0, 0)))
  filtered = sum(
    padded[:, i : i + 4, j : j + 3] * depth[i, j] for i, j in np.ndindex(5, 5)
  )
  expected = np.concatenate(
    [filtered[..., 2 * g : 2 * g + 2] @ point[g] for g in range(3)], axis=-1
  )
  # float32 sums of 50 terms of size one.
  np.testing.assert_allclose(branch(x), expected, rtol=1e-4, atol=1e-4)


def test_attention_takes_q_k_v_from_runs_of_three_head_dims(rng):
  d, heads = 4, 2
  attention = _randomised(
    efficientvit.MultiScaleLinearAttention(
      heads * d, head_dim=d, scales=(3,), norm="rms_norm", rngs=nnx.Rngs(0)
    ),
    rng,
  )
  x = jnp.asarray(rng.normal(size=(1, 3, 5, heads * d)), jnp.float32)
  qkv = np.asarray(attention.qkv(x))
  both = [qkv, np.asarray(attention.branches[0](jnp.asarray(qkv)))]
  outputs = []
  for source in both:
    tokens = source.reshape(15, -1)
    for head in range(heads):
      q, k, v = np.split(tokens[:, 3 * d * head : 3 * d * (head + 1)], 3, 1)
      weights = np.maximum(q, 0) @ np.maximum(k, 0).T
      outputs.append(weights @ v / (weights.sum(1, keepdims=True) + 1e-15))
  joined = np.concatenate(outputs, axis=1).reshape(1, 3, 5, -1)
  y = joined @ np.asarray(attention.out.kernel[...])
  y = y / np.sqrt(np.square(y).mean(-1, keepdims=True) + 1e-5)
  scale, bias = attention.norm.scale[...], attention.norm.bias[...]
  expected = y * np.asarray(scale) + np.asarray(bias)
  # float32, and a quotient of sums taken in another order.
  np.testing.assert_allclose(attention(x), expected, rtol=1e-3, atol=1e-3)


def test_blocks_normalise_before_adding(rng):
  """With scale and bias of the last norm at zero, a block is the identity."""
  x = jnp.asarray(rng.normal(size=(1, 4, 4, 8)), jnp.float32)
  res = efficientvit.ResBlock(
    8, norm="rms_norm", activation="silu", rngs=nnx.Rngs(0)
  )
  vit = efficientvit.EfficientViTBlock(
    8, head_dim=4, scales=(5,), norm="batch_norm", rngs=nnx.Rngs(0)
  )
  for block, norms in (
    (res, [res.norm]),
    (vit, [vit.norm, vit.attention.norm]),
  ):
    call = jax.jit(lambda block: block(x))
    assert np.abs(np.asarray(call(block)) - x).max() > 0.1
    for norm in norms:
      norm.scale[...] = jnp.zeros_like(norm.scale[...])
    np.testing.assert_array_equal(call(block), x)


def test_the_norm_of_a_stage_reaches_the_attention_but_not_the_ffn():
  block = efficientvit.EfficientViTBlock(
    8, head_dim=4, scales=(), norm="batch_norm", rngs=nnx.Rngs(0)
  )
  assert hasattr(block.attention.norm, "var")
  assert not hasattr(block.norm, "var")


def test_res_block_applies_the_activation_it_is_given(rng):
  x = jnp.asarray(rng.normal(size=(1, 4, 4, 4)), jnp.float32)
  outputs = {
    name: np.asarray(
      efficientvit.ResBlock(
        4, norm="rms_norm", activation=name, rngs=nnx.Rngs(0)
      )(x)
    )
    for name in efficientvit.ACTIVATIONS
  }
  np.testing.assert_array_equal(outputs["silu"], outputs["swish"])
  for name in ("relu", "mish", "gelu"):
    assert np.abs(outputs[name] - outputs["silu"]).max() > 1e-3, name
