"""ReLU linear attention as XLA runs it fast on every device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def attend(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  *,
  eps: float,
) -> Float[Array, "b n heads head_dim"]:
  """Attends with float32 sums, without float32 copies of bfloat16 inputs.

  Of bfloat16 inputs the state is summed in float32 and rounded once, for the
  product with the queries; the normaliser, which all of an output hangs on, is
  float32 throughout. Others are computed with in float32: a state does not fit
  float16.
  """
  dtype = v.dtype
  narrow = q.dtype == k.dtype == v.dtype == jnp.bfloat16
  if not narrow:
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  # Matrix products run per head. With heads in front these are plain batched
  # products; on accelerators the transposition is a choice of layout.
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
  q, k = jax.nn.relu(q), jax.nn.relu(k)
  options = {
    "precision": None if narrow else jax.lax.Precision.HIGHEST,
    "preferred_element_type": jnp.float32,
  }
  state = jnp.einsum("bhnk,bhnv->bhkv", k, v, **options)
  total = jnp.einsum("bhnk,bhkv->bhnv", q, state.astype(q.dtype), **options)
  normaliser = jnp.einsum(
    "bhnk,bhk->bhn",
    q.astype(jnp.float32),
    k.sum(axis=2, dtype=jnp.float32),
    precision=jax.lax.Precision.HIGHEST,
  )
  out = total / (normaliser[..., None] + eps)
  return out.astype(dtype).transpose(0, 2, 1, 3)
