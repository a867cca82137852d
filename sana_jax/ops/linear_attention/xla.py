"""ReLU linear attention as XLA runs it fast on every device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class State(NamedTuple):
  """What all keys and values come to; states of parts of the tokens add up.

  Attributes:
    products: of keys and values, summed over tokens.
    keys: summed over tokens.
  """

  products: Float[Array, "b heads head_dim head_dim"]
  keys: Float[Array, "b heads head_dim"]


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
  if not q.dtype == k.dtype == v.dtype == jnp.bfloat16:
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  return apply(q, state(k, v), eps=eps, dtype=dtype)


def state(
  k: Float[Array, "b n heads head_dim"], v: Float[Array, "b n heads head_dim"]
) -> State:
  """Sums over tokens, in float32."""
  k, v = (_heads_in_front(x) for x in (k, v))
  k = jax.nn.relu(k)
  products = jnp.einsum("bhnk,bhnv->bhkv", k, v, **_options(k.dtype))
  return State(products, k.sum(axis=2, dtype=jnp.float32))


def apply(
  q: Float[Array, "b n heads head_dim"],
  sums: State,
  *,
  eps: float,
  dtype: DTypeLike,
) -> Float[Array, "b n heads head_dim"]:
  """Attends to the tokens that a state is of; see `attend`.

  Args:
    dtype: of the result.
  """
  q = jax.nn.relu(_heads_in_front(q))
  total = jnp.einsum(
    "bhnk,bhkv->bhnv", q, sums.products.astype(q.dtype), **_options(q.dtype)
  )
  normaliser = jnp.einsum(
    "bhnk,bhk->bhn",
    q.astype(jnp.float32),
    sums.keys,
    precision=jax.lax.Precision.HIGHEST,
  )
  out = total / (normaliser[..., None] + eps)
  return out.astype(dtype).transpose(0, 2, 1, 3)


def _heads_in_front(x: Float[Array, "b n heads head_dim"]) -> Array:
  """Makes plain batched products of what is computed per head.

  On accelerators the transposition is a choice of layout.
  """
  return x.astype(_computed_in(x.dtype)).transpose(0, 2, 1, 3)


def _computed_in(dtype: DTypeLike) -> DTypeLike:
  return dtype if dtype == jnp.bfloat16 else jnp.float32


def _options(dtype: DTypeLike) -> dict[str, Any]:
  narrow = dtype == jnp.bfloat16
  return {
    "precision": None if narrow else jax.lax.Precision.HIGHEST,
    "preferred_element_type": jnp.float32,
  }
