"""Softmax attention as XLA runs it, on every device."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sana_jax.ops import last_axis


def attend(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m kv_heads head_dim"],
  v: Float[Array, "b m kv_heads head_dim"],
  *,
  mask: Bool[Array, "#b #n m"] | None,
  scale: float,
  softcap: float | None,
) -> Float[Array, "b n heads head_dim"]:
  """Attends, with float32 logits, weights and sums."""
  heads, kv_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
  grouped = q.reshape(*q.shape[:2], kv_heads, heads // kv_heads, head_dim)
  logits = jnp.einsum(
    "bngrd,bmgd->bgrnm", grouped, k, preferred_element_type=jnp.float32
  )
  logits = logits * scale
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  if mask is not None:
    logits = jnp.where(mask[:, None, None], logits, -1e30)
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  weights = weights.astype(v.dtype)
  # Dividing after the product with v touches head_dim values per query, not m.
  total = last_axis.total(weights)
  out = jnp.einsum(
    "bgrnm,bmgd->bngrd", weights, v, preferred_element_type=jnp.float32
  )
  out = out / total.transpose(0, 3, 1, 2, 4)
  return out.reshape(q.shape).astype(v.dtype)
