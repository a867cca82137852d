"""Depthwise convolutions as Mosaic kernels: one pass over memory on a TPU.

A picture is a list of tokens, row after row, so no width needs padding: a
neighbour in the picture is a token at a fixed distance, and masks silence those
that would be in another row. A program loads a window of tokens, with halos,
and a few hundred channels; one column of 128 channels at a time is widened to
float32 in scratch memory, and every tap is a load from there at an offset.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

_LANES = 128
# Tokens that are computed together: enough to hide latencies, few enough for
# the registers.
_CHUNK = 128
_MAX_COLUMNS = 4
_MIN_BLOCK = 2048
# Of 64 MiB and more, on all chips.
_VMEM_BYTES = 40 * 2**20
_DTYPES = (jnp.float32, jnp.bfloat16)


class _Plan(NamedTuple):
  """How the work is cut; sizes are in tokens and channels.

  Attributes:
    sides: of the filter.
    width: of the picture.
    tokens: of the picture.
    inputs: channels of the inputs; two: there is a gate.
    channels: of the result.
    block: tokens of the result that a program makes.
    halo: tokens loaded on each side of them, those that the filter reaches.
    columns: of 128 channels, that a program makes.
    gate_start: channel of its input where the gate begins.
  """

  sides: tuple[int, int]
  width: int
  tokens: int
  inputs: tuple[int, ...]
  channels: int
  block: int
  halo: int
  columns: int
  gate_start: int

  @property
  def gated(self) -> bool:
    return len(self.inputs) == 2

  @property
  def window(self) -> int:
    """Tokens that a program loads."""
    return min(self.block + 2 * self.halo, _round_up(self.tokens))

  @property
  def lanes(self) -> int:
    return _LANES * self.columns

  @property
  def blocks(self) -> tuple[int, int]:
    return (
      pl.cdiv(self.tokens, self.block),
      pl.cdiv(self.channels, self.lanes),
    )

  @property
  def shift(self) -> int:
    """Lanes by which the gate is off the registers."""
    return self.gate_start % _LANES

  def first_token(self, block):
    """Where the window of a block of tokens begins."""
    last = _round_up(self.tokens) - self.window
    return jnp.clip(block * self.block - self.halo, 0, last)

  def wanted_lane(self, part: int, block):
    """Where the registers begin that a block of channels is in."""
    start = self.gate_start - self.shift if part else 0
    return start + block * self.lanes

  def loaded_lanes(self, part: int) -> int:
    extra = _LANES if part and self.shift else 0
    return min(self.lanes + extra, _whole_lanes(self.inputs[part]))

  def first_lane(self, part: int, block):
    """Where the window of a block of channels begins: never outside."""
    last = _whole_lanes(self.inputs[part]) - self.loaded_lanes(part)
    return jnp.minimum(self.wanted_lane(part, block), last)

  def vmem_bytes(self, itemsize: int) -> int:
    """Bytes of a program: inputs and output twice, and scratch memory."""
    parts = range(len(self.inputs))
    loaded = sum(self.loaded_lanes(part) for part in parts)
    moved = self.window * loaded + self.block * self.lanes
    masks = (self.sides[1] - 1) * (self.width + _CHUNK)
    scratch = len(parts) * (2 * self.halo + self.window)
    return 2 * itemsize * moved + 4 * _LANES * (2 * masks + scratch)


def unsupported(inputs: Sequence[Array], sides: tuple[int, int]) -> str | None:
  """Says why the kernels cannot take such inputs; None: they can."""
  dtypes = {x.dtype for x in inputs}
  if len(dtypes) > 1 or not dtypes <= {jnp.dtype(d) for d in _DTYPES}:
    return f"inputs must be float32 or bfloat16, got {sorted(map(str, dtypes))}"
  itemsize = inputs[0].dtype.itemsize
  plan = _make_plan(inputs, sides, inputs[-1].shape[-1], 0)
  needed = plan.vmem_bytes(itemsize)
  if needed > _VMEM_BYTES:
    return (
      f"rows of {plan.width} with a filter of {sides} take {needed} bytes of "
      f"on-chip memory, more than {_VMEM_BYTES}"
    )
  return None


def gated_conv(
  value: Float[Array, "b h w _"],
  gate: Float[Array, "b h w _"],
  kernel: Float[Array, "2 kh kw c"],
  bias: Float[Array, "2 c"],
  *,
  gate_start: int = 0,
  block: int | None = None,
) -> Float[Array, "b h w c"]:
  """Computes a * silu(g); a, g: filtered silu of the inputs, plus bias.

  Args:
    value: its first c channels are read.
    gate: its c channels from `gate_start` on are read; may be `value` itself.
    block: tokens that a program makes, a multiple of 128; None: as many as fit.
  """
  taps = kernel.reshape(2, -1, kernel.shape[-1])
  taps = jnp.concatenate([taps, bias[:, None]], axis=1)
  inputs = (value, gate)
  plan = _make_plan(inputs, kernel.shape[1:3], taps.shape[-1], gate_start)
  return _call(inputs, taps, plan._replace(block=block or plan.block))


def conv(
  x: Float[Array, "b h w c"],
  kernel: Float[Array, "kh kw c"],
  *,
  block: int | None = None,
) -> Float[Array, "b h w c"]:
  """Filters every channel on its own, stride 1, with zeros around."""
  taps = kernel.reshape(1, -1, kernel.shape[-1])
  plan = _make_plan((x,), kernel.shape[:2], taps.shape[-1], 0)
  return _call((x,), taps, plan._replace(block=block or plan.block))


def _make_plan(
  inputs: Sequence[Array],
  sides: tuple[int, int],
  channels: int,
  gate_start: int,
) -> _Plan:
  """Chooses the widest columns, then the longest blocks, that fit."""
  _, height, width, _ = inputs[0].shape
  itemsize = inputs[0].dtype.itemsize
  whole = _round_up(height * width)
  halo = _round_up(sides[0] // 2 * width + sides[1] // 2)
  make = functools.partial(
    _Plan,
    sides=sides,
    width=width,
    tokens=height * width,
    inputs=tuple(x.shape[-1] for x in inputs),
    channels=channels,
    halo=halo,
    gate_start=gate_start,
  )
  # Halos are read twice, so they should be a small part of a block.
  least = min(whole, max(_MIN_BLOCK, 8 * halo))
  for columns in range(min(_MAX_COLUMNS, pl.cdiv(channels, _LANES)), 0, -1):
    for block in (whole, 4 * least, 2 * least, least):
      plan = make(block=min(block, whole), columns=columns)
      if plan.vmem_bytes(itemsize) <= _VMEM_BYTES:
        return plan
  return make(block=least, columns=1)


def _call(
  inputs: Sequence[Float[Array, "b h w _"]],
  taps: Float[Array, "parts taps c"],
  plan: _Plan,
) -> Float[Array, "b h w c"]:
  batch, height, width, _ = inputs[0].shape
  dtype = inputs[0].dtype
  token_blocks, channel_blocks = plan.blocks
  missing = channel_blocks * plan.lanes - plan.channels
  taps = jnp.pad(taps.astype(jnp.float32), ((0, 0), (0, 0), (0, missing)))
  masks = _masks(plan)
  out = pl.pallas_call(
    functools.partial(_kernel, plan=plan),
    grid=(batch, token_blocks, channel_blocks),
    in_specs=[
      *(_window(plan, part) for part in range(len(inputs))),
      pl.BlockSpec((*taps.shape[:2], plan.lanes), lambda b, t, c: (0, 0, c)),
      pl.BlockSpec(masks.shape, lambda b, t, c: (0, 0, 0)),
    ],
    out_specs=pl.BlockSpec(
      (pl.squeezed, plan.block, plan.lanes), lambda b, t, c: (b, t, c)
    ),
    out_shape=jax.ShapeDtypeStruct((batch, plan.tokens, plan.channels), dtype),
    scratch_shapes=[
      pltpu.VMEM((2 * plan.halo + plan.window, _LANES), jnp.float32)
      for _ in inputs
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "parallel"),
      vmem_limit_bytes=plan.vmem_bytes(dtype.itemsize) + 8 * 2**20,
    ),
    cost_estimate=_cost(plan, batch, dtype.itemsize),
    name="gated_conv" if plan.gated else "depthwise_conv",
  )(*(x.reshape(batch, -1, x.shape[-1]) for x in inputs), taps, masks)
  return out.reshape(batch, height, width, plan.channels)


def _window(plan: _Plan, part: int) -> pl.BlockSpec:
  """Says which tokens and channels of an input a program loads."""
  beyond = _round_up(plan.tokens) - plan.tokens
  outside = -plan.inputs[part] % _LANES

  def index(b, t, c):
    token = pl.multiple_of(plan.first_token(t), _CHUNK)
    lane = pl.multiple_of(plan.first_lane(part, c), _LANES)
    return b, token, lane

  tokens = pl.Element(plan.window, (0, beyond))
  lanes = pl.Element(plan.loaded_lanes(part), (0, outside))
  return pl.BlockSpec((pl.squeezed, tokens, lanes), index)


def _masks(plan: _Plan) -> Float[Array, "sides tokens lanes"]:
  """Says which tokens have a neighbour so many columns away.

  From any column on, for a chunk; the middle of the filter has no mask.
  """
  # By NumPy: a division by a width takes a TPU longer than to load the result.
  column = np.arange(_round_up(plan.width + _CHUNK)) % plan.width
  reach = plan.sides[1] // 2
  steps = [step for step in range(-reach, reach + 1) if step] or [0]
  inside = [(column + d >= 0) & (column + d < plan.width) for d in steps]
  known = jnp.asarray(np.stack(inside), jnp.float32)[..., None]
  return jnp.broadcast_to(known, (*known.shape[:2], _LANES))


def _kernel(*refs, plan: _Plan):
  parts = len(plan.inputs)
  sources, (taps, masks, out) = refs[:parts], refs[parts : parts + 3]
  scratch = refs[parts + 3 :]
  block = pl.program_id(1) * plan.block
  start = plan.first_token(pl.program_id(1))
  first = plan.halo + block - start
  count = pl.cdiv(jnp.minimum(plan.tokens - block, plan.block), _CHUNK)

  def make_column(index, _):
    _widen(sources, scratch, plan, index, start)
    lanes = pl.multiple_of(index * _LANES, _LANES)

    def make_chunk(index, column):
      at = pl.multiple_of(index * _CHUNK, _CHUNK)
      results = [
        _filter(scratch[p], taps.at[p], masks, plan, first + at, column, lanes)
        for p in range(parts)
      ]
      y = results[0] * _silu(results[1]) if plan.gated else results[0]
      out[pl.ds(at, _CHUNK), pl.ds(lanes, _LANES)] = y.astype(out.dtype)
      column = column + _CHUNK % plan.width
      return jnp.where(column >= plan.width, column - plan.width, column)

    jax.lax.fori_loop(0, count, make_chunk, block % plan.width)

  jax.lax.fori_loop(0, plan.columns, make_column, None)


def _widen(sources, windows, plan: _Plan, column, start):
  """Puts a column of the sources, in float32, between zeros.

  With a gate, their silu.
  """
  halo = plan.halo
  loads = [
    _loader(source, plan, part, column) for part, source in enumerate(sources)
  ]

  def widen(index, _):
    at = pl.multiple_of(index * _CHUNK, _CHUNK)
    for load, window in zip(loads, windows, strict=True):
      x = load(pl.ds(at, _CHUNK))
      window[pl.ds(halo + at, _CHUNK), :] = _silu(x) if plan.gated else x

  jax.lax.fori_loop(0, plan.window // _CHUNK, widen, None)
  for window in windows:
    _clear(window, plan, start)


def _clear(window, plan: _Plan, start):
  """Puts zeros where there is no picture."""
  halo = plan.halo
  zeros = jnp.zeros((halo, _LANES), jnp.float32)
  window[pl.ds(0, halo), :] = zeros

  @pl.when(start + plan.window >= plan.tokens)
  def _():
    # What was loaded from beyond the picture may be anything, NaN included.
    end = halo + plan.tokens - start
    rest = plan.tokens % _CHUNK
    if rest:
      last = pl.ds(pl.multiple_of(end - rest, _CHUNK), _CHUNK)
      row = jax.lax.broadcasted_iota(jnp.int32, (_CHUNK, _LANES), 0)
      window[last, :] = jnp.where(row < rest, window[last, :], 0.0)
    after = pl.multiple_of(end + -plan.tokens % _CHUNK, _CHUNK)
    window[pl.ds(after, halo), :] = zeros


def _loader(source, plan: _Plan, part: int, column):
  """Returns a function that loads tokens of a column, in float32."""
  block = pl.program_id(2)
  shift = plan.shift if part else 0
  skipped = plan.wanted_lane(part, block) - plan.first_lane(part, block)
  last = plan.loaded_lanes(part) - _LANES
  at = jnp.minimum(skipped + column * _LANES, last)
  after = jnp.minimum(at + _LANES, last)

  def load(tokens):
    x, y = (
      source[tokens, pl.ds(pl.multiple_of(lanes, _LANES), _LANES)]
      for lanes in (at, after)
    )
    if not shift:
      return x.astype(jnp.float32)
    if x.dtype == jnp.bfloat16:  # Registers of pairs: half as many to move.
      x, y = (pltpu.bitcast(z, jnp.int32) for z in (x, y))
    x, y = (pltpu.roll(z, _LANES - shift, 1) for z in (x, y))
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    x = jnp.where(lane < _LANES - shift, x, y)
    return pltpu.bitcast(x, source.dtype).astype(jnp.float32)

  return load


def _filter(window, taps, masks, plan: _Plan, first, column, lanes):
  """Sums the taps of a chunk of tokens, `first` being where it begins."""
  kh, kw = plan.sides
  lanes = pl.ds(lanes, _LANES)
  total = None
  for j in range(kw):
    step = j - kw // 2
    part = None
    for i in range(kh):
      at = first + (i - kh // 2) * plan.width + step
      x = window[pl.ds(at, _CHUNK), :] * taps[pl.ds(i * kw + j, 1), lanes]
      part = x if part is None else part + x
    if step:
      part = part * masks[step + kw // 2 - (step > 0), pl.ds(column, _CHUNK), :]
    total = part if total is None else total + part
  if plan.gated:
    total = total + taps[pl.ds(kh * kw, 1), lanes]
  return total


def _silu(x):
  half = 0.5 * x
  return half + half * jnp.tanh(half)


def _cost(plan: _Plan, batch: int, itemsize: int) -> pl.CostEstimate:
  parts = len(plan.inputs)
  size = batch * plan.tokens * plan.channels
  taps = plan.sides[0] * plan.sides[1]
  return pl.CostEstimate(
    flops=parts * 2 * taps * size,
    transcendentals=3 * size if plan.gated else 0,
    bytes_accessed=(parts + 1) * size * itemsize,
  )


def _round_up(tokens: int) -> int:
  return pl.cdiv(tokens, _CHUNK) * _CHUNK


def _whole_lanes(channels: int) -> int:
  return pl.cdiv(channels, _LANES) * _LANES
