"""Softmax attention with a mask and an optional soft-cap."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sana_jax.ops import last_axis


def softmax_attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m kv_heads head_dim"],
  v: Float[Array, "b m kv_heads head_dim"],
  *,
  mask: Bool[Array, "#b #n m"] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
) -> Float[Array, "b n heads head_dim"]:
  """Computes softmax(cap(scale * q k^T) + mask) v, in float32 inside.

  cap(s) = softcap * tanh(s / softcap). Each key/value head serves
  heads / kv_heads consecutive query heads. The result has the dtype of `v`.

  Args:
    mask: True where a query may attend to a key. A row without any True gives
      the plain average over all keys, not NaN.
    scale: multiplies the logits; 1 / sqrt(head_dim) when None.
    softcap: bound on the logits' magnitude, applied before the mask.

  Source: Vaswani et al., arXiv:1706.03762; soft-cap: Gemma 2, arXiv:2408.00118.
  """
  heads, kv_heads, head_dim = q.shape[2], k.shape[2], q.shape[3]
  scale = head_dim**-0.5 if scale is None else scale
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
