"""ReLU linear attention as a Triton kernel for NVIDIA GPUs.

Never chosen by itself: it was compiled ahead of time for H100 and A100, but
not run on a GPU, and what XLA makes of the plain form is good there. Pallas
means to drop Triton; this is as little as can be had with it.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jax.typing import DTypeLike
from jaxtyping import Array, Float

_ROWS = 64
# Products of Triton have sides of at least 16, all of them powers of two.
_HEAD_DIMS = (16, 32, 64, 128)
_PARAMS = {"num_warps": 4, "num_stages": 2}


def unsupported(
  shape: tuple[int, int, int, int], dtype: DTypeLike
) -> str | None:
  """Says why the kernel cannot do a shape; None where it can."""
  if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
    return f"inputs must be float32 or bfloat16, got {jnp.dtype(dtype)}"
  if shape[-1] not in _HEAD_DIMS:
    return f"head_dim must be one of {_HEAD_DIMS}, got {shape[-1]}"
  return None


def attend(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  *,
  eps: float,
  interpret: bool = False,
) -> Float[Array, "b n heads head_dim"]:
  """Attends: a kernel for the state, and one for its use."""
  sums = state(k, v, interpret=interpret)
  return apply(q, sums, eps=eps, interpret=interpret)


def state(
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  *,
  interpret: bool = False,
) -> tuple[Float[Array, "b heads k v"], Float[Array, "b heads k"]]:
  """Sums keys times values, and keys, over the tokens."""
  batch, _, heads, head_dim = k.shape
  sums = (batch, heads, head_dim)
  return pl.pallas_call(
    _state_kernel,
    grid=(batch, heads),
    out_shape=(
      jax.ShapeDtypeStruct((*sums, head_dim), jnp.float32),
      jax.ShapeDtypeStruct(sums, jnp.float32),
    ),
    compiler_params=plt.CompilerParams(**_PARAMS),
    interpret=interpret,
    name="relu_linear_attention_state",
  )(k, v)


def apply(
  q: Float[Array, "b n heads head_dim"],
  sums: tuple[Float[Array, "b heads k v"], Float[Array, "b heads k"]],
  *,
  eps: float,
  interpret: bool = False,
) -> Float[Array, "b n heads head_dim"]:
  """Attends to the tokens that `sums`, of `state`, were summed over."""
  batch, tokens, heads, _ = q.shape
  return pl.pallas_call(
    functools.partial(_apply_kernel, eps=eps),
    grid=(batch, heads, pl.cdiv(tokens, _ROWS)),
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    compiler_params=plt.CompilerParams(**_PARAMS),
    interpret=interpret,
    name="relu_linear_attention_apply",
  )(q, *sums)


def _state_kernel(k_ref, v_ref, state_ref, key_sum_ref):
  sample, head = pl.program_id(0), pl.program_id(1)
  tokens, head_dim = k_ref.shape[1], k_ref.shape[3]

  def add(block, sums):
    k, v = (_load(ref, sample, head, block) for ref in (k_ref, v_ref))
    k = jnp.maximum(k, 0)
    return (
      sums[0] + _dot(k.T, v),
      sums[1] + k.astype(jnp.float32).sum(axis=0),
    )

  zeros = (
    jnp.zeros((head_dim, head_dim), jnp.float32),
    jnp.zeros((head_dim,), jnp.float32),
  )
  state_ref[sample, head], key_sum_ref[sample, head] = jax.lax.fori_loop(
    0, pl.cdiv(tokens, _ROWS), add, zeros
  )


def _apply_kernel(q_ref, state_ref, key_sum_ref, out_ref, *, eps):
  sample, head, block = (pl.program_id(axis) for axis in range(3))
  q = jnp.maximum(_load(q_ref, sample, head, block), 0)
  total = _dot(q, state_ref[sample, head].astype(q.dtype))
  key_sum = key_sum_ref[sample, head][None]
  normaliser = (q.astype(jnp.float32) * key_sum).sum(axis=1)
  rows, inside = _rows(block, out_ref.shape[1])
  plt.store(
    out_ref.at[sample, rows, head],
    (total / (normaliser[:, None] + eps)).astype(out_ref.dtype),
    mask=jnp.broadcast_to(inside, q.shape),
  )


def _load(ref, sample, head, block):
  """Loads a block of tokens of a head, zeros beyond the last one."""
  rows, inside = _rows(block, ref.shape[1])
  mask = jnp.broadcast_to(inside, (_ROWS, ref.shape[3]))
  return plt.load(ref.at[sample, rows, head], mask=mask, other=0.0)


def _rows(block, tokens: int):
  start = block * _ROWS
  inside = (start + jnp.arange(_ROWS) < tokens)[:, None]
  return pl.ds(start, _ROWS), inside


def _dot(x, y):
  """Multiplies, summing in float32; float32 is not rounded to TF32."""
  return plt.dot(x, y, allow_tf32=False)
