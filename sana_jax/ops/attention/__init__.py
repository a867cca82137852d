"""Softmax attention with a mask and an optional soft-cap."""

import functools

import jax
from jaxtyping import Array, Bool, Float

from sana_jax.ops.attention import cudnn, xla

IMPLEMENTATIONS = ("xla", "cudnn")


def softmax_attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m kv_heads head_dim"],
  v: Float[Array, "b m kv_heads head_dim"],
  *,
  mask: Bool[Array, "#b #n m"] | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "b n heads head_dim"]:
  """Computes softmax(cap(scale * q k^T) + mask) v, in float32 inside.

  cap(s) = softcap * tanh(s / softcap). Each key/value head serves
  heads / kv_heads consecutive query heads. The result has the dtype of `v`.

  Args:
    mask: True where a query may attend to a key. A row without any True gives
      the plain average over all keys, not NaN.
    scale: multiplies the logits; 1 / sqrt(head_dim) when None.
    softcap: bound on the logits' magnitude, applied before the mask.
    implementation: "xla", on any device; "cudnn", a kernel of NVIDIA's that
      keeps the logits on the chip, except where something is differentiated.
      None: "xla". Derivatives, of any order, are those of "xla".

  Raises:
    ValueError: an implementation that there is not.
    NotImplementedError: "cudnn" cannot do this, or not here.

  Source: Vaswani et al., arXiv:1706.03762; soft-cap: Gemma 2, arXiv:2408.00118.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"softmax_attention: implementation must be None or one of "
      f"{IMPLEMENTATIONS}, got {implementation!r}."
    )
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  if implementation != "cudnn":
    return xla.attend(q, k, v, mask=mask, scale=scale, softcap=softcap)
  reason = cudnn.unsupported(q, k, v, softcap=softcap)
  if reason is not None:
    raise NotImplementedError(
      f"softmax_attention: cudnn cannot do this: {reason}; use "
      'implementation="xla".'
    )
  return _cudnn(scale, mask, q, k, v)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _cudnn(scale, mask, q, k, v):
  return cudnn.attend(q, k, v, mask=mask, scale=scale)


@_cudnn.defjvp
def _cudnn_jvp(scale, primals, tangents):
  """Differentiates XLA's form, whose value is then a by-product.

  Of cuDNN's, JAX has a rule for reverse differentiation, once.
  """
  mask, q, k, v = primals
  plain = functools.partial(xla.attend, mask=mask, scale=scale, softcap=None)
  return jax.jvp(plain, (q, k, v), tangents[1:])
