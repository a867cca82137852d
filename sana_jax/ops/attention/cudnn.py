"""Softmax attention by cuDNN, for NVIDIA GPUs.

Never chosen by itself: it has not been run. JAX asks the GPU of this process
about its abilities while it traces, so it cannot be compiled for one that is
elsewhere, nor be left to the lowering of a program.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_MAX_HEAD_DIM = 128


def unsupported(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m kv_heads head_dim"],
  v: Float[Array, "b m kv_heads head_dim"],
  *,
  softcap: float | None,
) -> str | None:
  """Says why cuDNN cannot do this; None where it can."""
  dtypes = [jnp.dtype(x.dtype).name for x in (q, k, v)]
  if dtypes != ["bfloat16"] * 3:
    return f"inputs must be bfloat16, got {', '.join(dtypes)}"
  if softcap is not None:
    return f"it has no soft-cap, got {softcap}"
  head_dim = q.shape[-1]
  if head_dim > _MAX_HEAD_DIM or head_dim % 8:
    return (
      f"head_dim must be a multiple of 8 up to {_MAX_HEAD_DIM}, got {head_dim}"
    )
  if jax.default_backend() != "gpu":
    return f"it needs a GPU, and JAX runs on {jax.default_backend()} here"
  return None


def attend(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m kv_heads head_dim"],
  v: Float[Array, "b m kv_heads head_dim"],
  *,
  mask: Bool[Array, "#b #n m"] | None,
  scale: float,
) -> Float[Array, "b n heads head_dim"]:
  """Attends in one kernel."""
  if mask is not None:
    # Of heads, one will do for all; of queries, cuDNN wants each.
    mask = jnp.broadcast_to(mask, (q.shape[0], q.shape[1], k.shape[1]))
    mask = mask[:, None]
  return jax.nn.dot_product_attention(
    q, k, v, mask=mask, scale=scale, implementation="cudnn"
  )
