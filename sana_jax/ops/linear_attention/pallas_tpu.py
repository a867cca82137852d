"""ReLU linear attention as a Mosaic kernel for TPUs.

Heads are narrower than the 128 lanes of a TPU, so several share a group of
lanes, and a group is attended to as one head whose state is block-diagonal:
the products waste arithmetic, which there is plenty of, and no memory traffic.
The state of a group, [keys, values and ones], is summed over the tokens in
float32 in VMEM. A column of ones gives the normaliser, on all lanes at once.

bfloat16 inputs are multiplied as they are. The state is applied to them in two
bfloat16 parts, which together have 16 bits of mantissa.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Float

LANES = 128
# Of VMEM, for two copies of four blocks of tokens; the limit is 16 MiB.
_BLOCKS_BYTES = 6 * 2**20
_MAX_STATE_BYTES = 6 * 2**20
_MAX_TOKENS = 1024
# Rows of a bfloat16 tile; float32 has tiles of 8.
_TILE_ROWS = 16


def unsupported(
  shape: tuple[int, int, int, int], dtype: DTypeLike
) -> str | None:
  """Says why the kernel cannot do a shape; None where it can."""
  *_, heads, head_dim = shape
  if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
    return f"inputs must be float32 or bfloat16, got {jnp.dtype(dtype)}"
  if LANES % head_dim:
    return f"head_dim must divide {LANES}, got {head_dim}"
  if _state_bytes(heads * head_dim) > _MAX_STATE_BYTES:
    return (
      f"the state of {heads} heads of {head_dim} takes "
      f"{_state_bytes(heads * head_dim)} bytes, more than {_MAX_STATE_BYTES}"
    )
  return None


def attend(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  *,
  eps: float,
  interpret: Any = False,
) -> Float[Array, "b n heads head_dim"]:
  """Attends in one kernel: a pass over keys and values, one over queries."""
  shape, head_dim = q.shape, q.shape[-1]
  q, k, v = (x.reshape(*x.shape[:2], -1) for x in (q, k, v))
  batch, tokens, width = q.shape
  rows = _block_rows(tokens, width, q.dtype)
  last = pl.cdiv(tokens, rows) - 1
  # What a pass does not use stays where it is, so nothing is copied twice.
  queries = pl.BlockSpec((1, rows, width), lambda b, p, n: (b, p * n, 0))
  keys = pl.BlockSpec(
    (1, rows, width), lambda b, p, n: (b, jnp.where(p == 0, n, last), 0)
  )
  kernel = functools.partial(
    _attend_kernel, tokens=tokens, head_dim=head_dim, eps=eps
  )
  out = pl.pallas_call(
    kernel,
    grid=(batch, 2, last + 1),
    in_specs=[queries, keys, keys],
    out_specs=queries,
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_shapes=[
      pltpu.VMEM((1, *_state_shape(width)), jnp.float32),
      pltpu.VMEM(_operand_shape(width, q.dtype), q.dtype),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary")
    ),
    cost_estimate=_cost(q, passes=2),
    interpret=interpret,
    name="relu_linear_attention",
  )(q, k, v)
  return out.reshape(shape)


def state(
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  *,
  interpret: Any = False,
) -> Float[Array, "b groups pack head_dim values"]:
  """Sums keys times [values, 1] over the tokens, without the zeros."""
  head_dim = k.shape[-1]
  k, v = (x.reshape(*x.shape[:2], -1) for x in (k, v))
  batch, tokens, width = k.shape
  rows = _block_rows(tokens, width, k.dtype)
  keys = pl.BlockSpec((1, rows, width), lambda b, n: (b, n, 0))
  shape = _state_shape(width)
  sums = pl.pallas_call(
    functools.partial(_state_kernel, tokens=tokens),
    grid=(batch, pl.cdiv(tokens, rows)),
    in_specs=[keys, keys],
    out_specs=pl.BlockSpec((1, *shape), lambda b, n: (b, 0, 0, 0)),
    out_shape=jax.ShapeDtypeStruct((batch, *shape), jnp.float32),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    cost_estimate=_cost(k, passes=1),
    interpret=interpret,
    name="relu_linear_attention_state",
  )(k, v)
  return _without_zeros(sums, head_dim)


def apply(
  q: Float[Array, "b n heads head_dim"],
  sums: Float[Array, "b groups pack head_dim values"],
  *,
  eps: float,
  interpret: Any = False,
) -> Float[Array, "b n heads head_dim"]:
  """Attends to the tokens that `sums`, of `state`, was summed over."""
  shape, head_dim = q.shape, q.shape[-1]
  q = q.reshape(*q.shape[:2], -1)
  batch, tokens, width = q.shape
  rows = _block_rows(tokens, width, q.dtype)
  queries = pl.BlockSpec((1, rows, width), lambda b, n: (b, n, 0))
  out = pl.pallas_call(
    functools.partial(_apply_kernel, head_dim=head_dim, eps=eps),
    grid=(batch, pl.cdiv(tokens, rows)),
    in_specs=[
      queries,
      pl.BlockSpec((1, *_state_shape(width)), lambda b, n: (b, 0, 0, 0)),
    ],
    out_specs=queries,
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_shapes=[pltpu.VMEM(_operand_shape(width, q.dtype), q.dtype)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary")
    ),
    cost_estimate=_cost(q, passes=1),
    interpret=interpret,
    name="relu_linear_attention_apply",
  )(q, _with_zeros(sums))
  return out.reshape(shape)


def _attend_kernel(
  q_ref, k_ref, v_ref, out_ref, state_ref, operand_ref, *, tokens, head_dim, eps
):
  last = pl.num_programs(2) - 1
  reading, block = pl.program_id(1) == 0, pl.program_id(2)

  @pl.when(reading & (block == 0))
  def _():
    state_ref[...] = jnp.zeros_like(state_ref)

  @pl.when(reading)
  def _():
    _add(k_ref, v_ref, state_ref, block, tokens)

  @pl.when(reading & (block == last))
  def _():
    _prepare(state_ref, operand_ref, head_dim)

  @pl.when(jnp.logical_not(reading))
  def _():
    _divide(q_ref, operand_ref, out_ref, eps)


def _state_kernel(k_ref, v_ref, state_ref, *, tokens):
  block = pl.program_id(1)

  @pl.when(block == 0)
  def _():
    state_ref[...] = jnp.zeros_like(state_ref)

  _add(k_ref, v_ref, state_ref, block, tokens)


def _apply_kernel(q_ref, state_ref, out_ref, operand_ref, *, head_dim, eps):
  @pl.when(pl.program_id(1) == 0)
  def _():
    _prepare(state_ref, operand_ref, head_dim)

  _divide(q_ref, operand_ref, out_ref, eps)


def _add(k_ref, v_ref, state_ref, block, tokens):
  """Adds the products of a block of tokens to the state."""
  _, rows, width = k_ref.shape
  for group, (start, size) in enumerate(_groups(width)):
    lanes = slice(start, start + size)
    k, v = jnp.maximum(k_ref[0, :, lanes], 0), v_ref[0, :, lanes]
    if tokens % rows:
      # Beyond the last token lies anything, and NaN times zero is NaN.
      left = tokens - block * rows
      inside = jax.lax.broadcasted_iota(jnp.int32, k.shape, 0) < left
      k, v = (jnp.where(inside, x, jnp.zeros_like(x)) for x in (k, v))
    for column, values in enumerate((v, jnp.ones_like(v))):
      at = slice(column * LANES, column * LANES + size)
      state_ref[0, group, :size, at] += _dot(k, values, contract=0)


def _prepare(state_ref, operand_ref, head_dim):
  """Writes the state as what queries are multiplied with."""
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, (LANES, 2 * LANES), axis)
    for axis in (0, 1)
  )
  # Both are powers of two. Without a division, which Mosaic compiles only where
  # it is told for which TPU.
  own = (row ^ (column & (LANES - 1))) < head_dim
  parts = operand_ref.shape[0]
  for group in range(state_ref.shape[1]):
    rest = jnp.where(own, state_ref[0, group], 0.0)
    for part in range(parts):
      rounded = rest.astype(operand_ref.dtype)
      operand_ref[part, group] = rounded
      if part + 1 < parts:
        rest = rest - rounded.astype(jnp.float32)


def _divide(q_ref, operand_ref, out_ref, eps):
  """Multiplies a block of queries with the state, and normalises."""
  for group, (start, size) in enumerate(_groups(q_ref.shape[2])):
    lanes = slice(start, start + size)
    q = jnp.maximum(q_ref[0, :, lanes], 0)
    both = sum(
      _dot(q, operand_ref[part, group, :size], contract=1)
      for part in range(operand_ref.shape[0])
    )
    total, normaliser = both[:, :size], both[:, LANES : LANES + size]
    out_ref[0, :, lanes] = (total / (normaliser + eps)).astype(out_ref.dtype)


def _dot(x, y, *, contract: int):
  """Multiplies, in float32; float32 is not rounded to bfloat16 first."""
  whole = x.dtype == jnp.float32
  return jax.lax.dot_general(
    x,
    y,
    (((contract,), (0,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if whole else None,
    preferred_element_type=jnp.float32,
  )


def _groups(width: int) -> list[tuple[int, int]]:
  """Cuts the lanes; the last group may be narrower."""
  return [(i, min(LANES, width - i)) for i in range(0, width, LANES)]


def _block_rows(tokens: int, width: int, dtype: DTypeLike) -> int:
  padded = pl.cdiv(width, LANES) * LANES
  fitting = _BLOCKS_BYTES // (8 * padded * jnp.dtype(dtype).itemsize)
  rows = max(_TILE_ROWS, min(fitting, _MAX_TOKENS) // _TILE_ROWS * _TILE_ROWS)
  if rows >= tokens:
    return tokens
  # As few blocks, but of about the same size.
  blocks = pl.cdiv(tokens, rows)
  return pl.cdiv(pl.cdiv(tokens, blocks), _TILE_ROWS) * _TILE_ROWS


def _state_shape(width: int) -> tuple[int, int, int]:
  return pl.cdiv(width, LANES), LANES, 2 * LANES


def _state_bytes(width: int) -> int:
  return pl.cdiv(width, LANES) * LANES * 2 * LANES * 4


def _operand_shape(width: int, dtype: DTypeLike) -> tuple[int, ...]:
  return (4 // jnp.dtype(dtype).itemsize, *_state_shape(width))


def _without_zeros(
  sums: Float[Array, "b groups lanes twice"], head_dim: int
) -> Float[Array, "b groups pack head_dim values"]:
  """Cuts the blocks of heads out of states, and one column of the sums."""
  pack = LANES // head_dim
  split = sums.reshape(*sums.shape[:2], pack, head_dim, 2, pack, head_dim)
  own = jnp.stack([split[:, :, i, :, :, i] for i in range(pack)], axis=2)
  return jnp.concatenate([own[..., 0, :], own[..., 1, :1]], axis=-1)


def _with_zeros(
  sums: Float[Array, "b groups pack head_dim values"],
) -> Float[Array, "b groups lanes twice"]:
  """Repeats states over the lanes; the kernel masks what is another head's."""
  *leading, pack, head_dim, _ = sums.shape
  values, ones = sums[..., :-1], sums[..., -1:]
  halves = (values, jnp.broadcast_to(ones, values.shape))
  return jnp.concatenate(
    [
      jnp.tile(x.reshape(*leading, pack * head_dim, head_dim), pack)
      for x in halves
    ],
    axis=-1,
  )


def _cost(x: Float[Array, "b n width"], *, passes: int) -> pl.CostEstimate:
  products = 2 if x.dtype == jnp.bfloat16 else 1
  return pl.CostEstimate(
    flops=2 * x.size * 2 * LANES * passes * products,
    bytes_accessed=2 * x.size * x.dtype.itemsize * passes,
    transcendentals=0,
  )
