"""Decodes large images in windows, exactly, to bound memory.

The decoder's outer levels, which take most of the memory, have convolutions
only: a pixel depends on few features around it. They are hence computed window
by window, each with a halo that is thrown away. The inner levels have linear
attention, which sees all tokens, but as a sum: it is added up window by window
first, and applied window by window then.

So the results are those of a whole image, up to rounding; tiles (`tiling.py`)
differ.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sana_jax.models import dc_ae
from sana_jax.nn import efficientvit, layers, vision
from sana_jax.ops import linear_attention as linear_attention_op

# Levels that windows go through from features to pixels. Each further one would
# double the halo of those before.
_MAX_OUTER = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Windows:
  """Size of the windows, in pixels that are kept, the halo not included.

  Raises:
    ValueError: a side that is not positive.
  """

  window_side: int

  def __post_init__(self):
    if self.window_side < 1:
      raise ValueError(
        f"windows: window_side must be positive, got {self.window_side}."
      )

  def __str__(self) -> str:
    return f"windows of {self.window_side}x{self.window_side}"

  def covers(self, height: int, width: int) -> bool:
    """Whether one window holds an image of so many pixels."""
    return max(height, width) <= self.window_side

  def check_multiples(self, factor: int) -> None:
    """Refuses a side that is no whole number of latents.

    Args:
      factor: the autoencoder's spatial compression.

    Raises:
      ValueError: names the side.
    """
    if self.window_side % factor:
      raise ValueError(
        f"windows: a side of {self.window_side} must be a multiple of "
        f"{factor}, the autoencoder's spatial compression."
      )


class Outer(NamedTuple):
  """The levels of a decoder that are local, from full resolution down.

  Attributes:
    count: of stages.
    scale: pixels per feature that they start from, along each side.
    halo: features to each side that a pixel depends on, beside its own.
  """

  count: int
  scale: int
  halo: int


def outer_levels(stages: Sequence[dc_ae.StageSpec], upsample: str) -> Outer:
  """Finds what windows are decoded through: at most three levels.

  Args:
    stages: of a decoder, from full resolution down.
    upsample: its method.
  """
  if stages[0].depth:
    scale, halo = 1, layers.Conv.reach
  else:
    scale, halo = 2, vision.reach_before_upsample(0, upsample)
  count = 0
  for stage in stages[:-1][:_MAX_OUTER]:
    if stage.depth and stage.block != "ResBlock":
      break
    count += 1
    if stage.depth:
      halo += stage.depth * efficientvit.ResBlock.reach
      scale, halo = 2 * scale, vision.reach_before_upsample(halo, upsample)
  return Outer(count, scale, halo)


def decode(
  autoencoder: dc_ae.DCAE, latents: Float[Array, "b h w c"], windows: Windows
) -> Float[Array, "b h2 w2 rgb"]:
  """Decodes latents in windows, to what `autoencoder.decode` makes of them.

  To be called under `jax.jit`. On the inner levels windows have as many
  features a side as where the outer levels start: there are fewer of them.

  Raises:
    ValueError: a side that is no multiple of the compression.
  """
  windows.check_multiples(autoencoder.spatial_compression)
  decoder = autoencoder.decoder
  outer = outer_levels(decoder.specs, decoder.upsample)
  side = windows.window_side // outer.scale
  x = decoder.begin(latents)
  for stage in reversed(decoder.stages[outer.count :]):
    if stage.up is not None:
      halo = vision.reach_before_upsample(0, decoder.upsample)
      x = apply_local(stage.up, x, side=side, halo=halo, scale=2)
    for block in stage.blocks:
      x = _apply_block(block, x, side)
  return apply_local(
    functools.partial(decoder.finish, stages=decoder.stages[: outer.count]),
    x,
    side=side,
    halo=outer.halo,
    scale=outer.scale,
  )


def apply_local(
  function: Callable[[Array], Array],
  x: Float[Array, "b h w c"],
  *,
  side: int,
  halo: int,
  scale: int = 1,
) -> Float[Array, "b h2 w2 d"]:
  """Computes `function(x)` window by window.

  Windows are all of one size and lie within `x`. What a window lacks at its
  edges, `function` pads as it does at the borders of `x`: where the two meet,
  this is right, and elsewhere it spoils no more than the halo.

  Args:
    function: makes `scale` times as many rows and columns.
    side: rows and columns of a window, beside its halo.
    halo: rows and columns to each side that `function` looks at.
  """
  cuts = _cuts(x, side, halo)
  if all(cut.count == 1 for cut in cuts):
    return function(x)

  def one(number, out):
    rows, columns = _places(cuts, number)
    y = function(_window(x, cuts, rows, columns))
    kept = jax.lax.dynamic_slice(
      y,
      (0, scale * rows.margin, scale * columns.margin, 0),
      (y.shape[0], *(scale * cut.side for cut in cuts), y.shape[3]),
    )
    at = (0, scale * rows.kept, scale * columns.kept, 0)
    return jax.lax.dynamic_update_slice(out, kept, at)

  shape = jax.eval_shape(function, x)
  count = cuts[0].count * cuts[1].count
  return jax.lax.fori_loop(0, count, one, jnp.zeros(shape.shape, shape.dtype))


class _Cut(NamedTuple):
  """How one axis is cut.

  Attributes:
    extent: of the axis.
    side: that is kept of a window.
    size: of a window, its halo included.
  """

  extent: int
  side: int
  size: int

  @property
  def count(self) -> int:
    return _divide_up(self.extent, self.side)


class _Place(NamedTuple):
  """Where a window lies along an axis.

  Attributes:
    start: of the window.
    kept: start of what is kept of it.
    repeated: how much of that the window before has made already.
  """

  start: Int[Array, ""]
  kept: Int[Array, ""]
  repeated: Int[Array, ""]

  @property
  def margin(self) -> Int[Array, ""]:
    return self.kept - self.start


def _cuts(x: Array, side: int, halo: int) -> tuple[_Cut, _Cut]:
  def cut(extent: int) -> _Cut:
    if side + 2 * halo >= extent:
      return _Cut(extent, extent, extent)
    # As many windows, but as small as will do.
    kept = _divide_up(extent, _divide_up(extent, side))
    return _Cut(extent, kept, kept + 2 * halo)

  return cut(x.shape[1]), cut(x.shape[2])


def _divide_up(a: int, b: int) -> int:
  return -(-a // b)


def _places(
  cuts: tuple[_Cut, _Cut], number: Int[Array, ""]
) -> tuple[_Place, _Place]:
  rows, columns = cuts
  return (
    _place(rows, number // columns.count),
    _place(columns, number % columns.count),
  )


def _place(cut: _Cut, number: Int[Array, ""]) -> _Place:
  begin = number * cut.side
  kept = jnp.minimum(begin, cut.extent - cut.side)
  halo = (cut.size - cut.side) // 2
  start = jnp.clip(kept - halo, 0, cut.extent - cut.size)
  return _Place(start, kept, begin - kept)


def _window(x: Array, cuts, rows: _Place, columns: _Place) -> Array:
  size = (x.shape[0], cuts[0].size, cuts[1].size, x.shape[3])
  return jax.lax.dynamic_slice(x, (0, rows.start, columns.start, 0), size)


def _apply_block(block, x: Float[Array, "b h w c"], side: int) -> Array:
  if isinstance(block, efficientvit.ResBlock):
    return apply_local(block, x, side=side, halo=block.reach)
  attention = block.attention
  halo = attention.reach + block.feed_forward_reach
  if all(cut.count == 1 for cut in _cuts(x, side, halo)):
    return block(x)
  state = _attention_state(attention, x, side)

  def rest(window):
    return block.feed_forward(window + attention.attend(window, state))

  return apply_local(rest, x, side=side, halo=halo)


def _attention_state(
  attention: efficientvit.MultiScaleLinearAttention,
  x: Float[Array, "b h w c"],
  side: int,
) -> linear_attention_op.State:
  """Sums keys and values over all tokens, window by window."""
  cuts = _cuts(x, side, attention.reach)

  def one(number):
    places = _places(cuts, number)
    window = _window(x, cuts, *places)
    _, keys, values = attention.queries_keys_values(window)
    # Tokens of the halo, or that another window has counted.
    mine = functools.reduce(
      operator.and_,
      (
        _counted(cut, place).reshape([-1 if i == axis else 1 for i in range(5)])
        for axis, (cut, place) in enumerate(zip(cuts, places, strict=True), 1)
      ),
    )
    keys = jnp.where(mine, keys, jnp.zeros((), keys.dtype))
    keys, values = (
      part.reshape(part.shape[0], -1, *part.shape[3:])
      for part in (keys, values)
    )
    return linear_attention_op.state(keys, values)

  def add(number, state):
    return jax.tree.map(operator.add, state, one(number))

  zeros = jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, 0)
  )
  count = cuts[0].count * cuts[1].count
  return jax.lax.fori_loop(0, count, add, zeros)


def _counted(cut: _Cut, place: _Place) -> Array:
  """Which rows or columns of a window no other window is to count."""
  index = jnp.arange(cut.size) - place.margin
  return (index >= place.repeated) & (index < cut.side)
