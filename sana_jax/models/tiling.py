"""Encodes and decodes large images in overlapping tiles, to bound memory.

A tile knows nothing of its neighbours, so results differ from those of a whole
image; linear ramps across the overlaps hide the seams.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.models import dc_ae

_Size = tuple[int, int]
_Grid = list[list[Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
  """Sizes of tiles and the steps between them, in pixels.

  The defaults are those of published pipelines; 1024 and 896 suit 4K images.

  Raises:
    ValueError: a stride that is not positive, or larger than its tile.
  """

  tile_height: int = 512
  tile_width: int = 512
  stride_height: int = 448
  stride_width: int = 448

  def __post_init__(self):
    for tile, stride in zip(self.tile, self.stride, strict=True):
      if not 0 < stride <= tile:
        raise ValueError(
          f"tiling: a stride must be in [1, tile size], got stride {stride} "
          f"for tiles of {tile} pixels."
        )

  @property
  def tile(self) -> _Size:
    return self.tile_height, self.tile_width

  @property
  def stride(self) -> _Size:
    return self.stride_height, self.stride_width


def encode(
  autoencoder: dc_ae.DCAE, images: Float[Array, "b h w rgb"], tiling: Tiling
) -> Float[Array, "b h2 w2 c"]:
  """Encodes images, in tiles where they are larger than one.

  A tile at the border whose side is no multiple of the compression is padded
  with zeros; the latents are cropped to whole multiples of the image. To be
  called under `jax.jit`, where it compiles one encoder per shape of tile.

  Raises:
    ValueError: sizes in `tiling` that are no multiples of the compression.
  """
  factor = autoencoder.spatial_compression
  tile, stride = _latent_sizes(tiling, factor)
  if _fits(images, tiling.tile):
    return autoencoder.encode(images)
  grid = _map_tiles(
    autoencoder.encode, images, tiling.tile, tiling.stride, multiple=factor
  )
  latents = _join(grid, overlap=_difference(tile, stride), keep=stride)
  height, width = images.shape[1:3]
  return latents[:, : height // factor, : width // factor]


def decode(
  autoencoder: dc_ae.DCAE, latents: Float[Array, "b h w c"], tiling: Tiling
) -> Float[Array, "b h2 w2 rgb"]:
  """Decodes latents, in tiles where the images are larger than one.

  To be called under `jax.jit`, where it compiles one decoder per shape of tile.

  Raises:
    ValueError: sizes in `tiling` that are no multiples of the compression.
  """
  tile, stride = _latent_sizes(tiling, autoencoder.spatial_compression)
  if _fits(latents, tile):
    return autoencoder.decode(latents)
  grid = _map_tiles(autoencoder.decode, latents, tile, stride, multiple=1)
  overlap = _difference(tiling.tile, tiling.stride)
  return _join(grid, overlap=overlap, keep=tiling.stride)


def _latent_sizes(tiling: Tiling, factor: int) -> tuple[_Size, _Size]:
  if any(size % factor for size in tiling.tile + tiling.stride):
    raise ValueError(
      f"tiling: tiles {tiling.tile} and strides {tiling.stride} must be "
      f"multiples of {factor}, the autoencoder's spatial compression."
    )
  tile, stride = (
    (height // factor, width // factor)
    for height, width in (tiling.tile, tiling.stride)
  )
  return tile, stride


def _fits(x: Float[Array, "b h w c"], tile: _Size) -> bool:
  return x.shape[1] <= tile[0] and x.shape[2] <= tile[1]


def _difference(a: _Size, b: _Size) -> _Size:
  return a[0] - b[0], a[1] - b[1]


def _map_tiles(
  function: Callable[[Array], Array],
  x: Float[Array, "b h w c"],
  tile: _Size,
  stride: _Size,
  *,
  multiple: int,
) -> _Grid:
  """Applies `function` to all tiles, one at a time, row by row.

  Tiles of the same shape share one compiled loop: there are few shapes, since
  only the last ones of a row or column are smaller.
  """
  by_shape = defaultdict(list)
  rows = range(0, x.shape[1], stride[0])
  columns = range(0, x.shape[2], stride[1])
  for row in rows:
    for column in columns:
      piece = x[:, row : row + tile[0], column : column + tile[1]]
      missing = [-side % multiple for side in piece.shape[1:3]]
      piece = jnp.pad(piece, [(0, 0), *((0, n) for n in missing), (0, 0)])
      by_shape[piece.shape].append(((row, column), piece))
  results = {}
  for placed in by_shape.values():
    places, pieces = zip(*placed, strict=True)
    outputs = jax.lax.map(function, jnp.stack(pieces))
    results |= zip(places, outputs, strict=True)
  return [[results[row, column] for column in columns] for row in rows]


def _join(grid: _Grid, *, overlap: _Size, keep: _Size) -> Array:
  """Blends each tile into its blended neighbours above and to the left."""
  rows = []
  above: list[Array] = []
  for tiles in grid:
    blended: list[Array] = []
    for j, tile in enumerate(tiles):
      if above:
        tile = _blend(above[j], tile, overlap[0], axis=1)
      if blended:
        tile = _blend(blended[-1], tile, overlap[1], axis=2)
      blended.append(tile)
    rows.append(
      jnp.concatenate([t[:, : keep[0], : keep[1]] for t in blended], axis=2)
    )
    above = blended
  return jnp.concatenate(rows, axis=1)


def _blend(before: Array, after: Array, extent: int, *, axis: int) -> Array:
  """Fades from the end of `before` to `after`: a (1 - k/E) + b k/E.

  E is `extent`, or a whole tile that is smaller. A tile that the image's border
  cuts overlaps its neighbour by less: published models fade over E all the
  same, and so does this.
  """
  extent = min(before.shape[axis], after.shape[axis], extent)
  start = before.shape[axis] - extent
  old = jax.lax.slice_in_dim(before, start, None, axis=axis)
  new = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
  rest = jax.lax.slice_in_dim(after, extent, None, axis=axis)
  # float32: bfloat16 ramps are visible as bands.
  ramp = jnp.arange(extent, dtype=jnp.float32) / max(extent, 1)
  ramp = ramp.reshape([-1 if i == axis else 1 for i in range(after.ndim)])
  faded = (old * (1 - ramp) + new * ramp).astype(after.dtype)
  return jnp.concatenate([faded, rest], axis=axis)
