"""ReLU linear attention: O(n) in the number of tokens."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def relu_linear_attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  *,
  eps: float = 1e-15,
) -> Float[Array, "b n heads head_dim"]:
  """Attends with the kernel relu(q) . relu(k), normalised per query.

  out_n = (sum_m v_m (k_m . q_n)) / (sum_m k_m . q_n + eps),  q, k after ReLU.

  Computed in float32 whatever the input: the sums run over all tokens, and a
  low-precision normaliser stalls or overflows. The result is float32 too, so
  the caller decides where to round.

  Source: Xie et al., SANA, arXiv:2410.10629, section 2.2; EfficientViT,
  arXiv:2205.14756, equation 3.
  """
  q = jax.nn.relu(q).astype(jnp.float32)
  k = jax.nn.relu(k).astype(jnp.float32)
  v = v.astype(jnp.float32)
  key_value = jnp.einsum("bnhk,bnhv->bhkv", k, v)
  normaliser = jnp.einsum("bnhk,bhk->bnh", q, k.sum(axis=1))
  out = jnp.einsum("bnhk,bhkv->bnhv", q, key_value)
  return out / (normaliser[..., None] + eps)
