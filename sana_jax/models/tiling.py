"""Encodes and decodes large images in overlapping tiles, to bound memory.

A tile knows nothing of its neighbours, so results differ from those of a whole
image; linear ramps across the overlaps hide the seams.

`encode` and `decode` do it all in one program. `split` and `join` are its two
ends, for callers that run the tiles elsewhere, such as on several devices.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sana_jax.models import dc_ae

_Size = tuple[int, int]
# Height and width of some tiles, which share one compiled program.
Shape = tuple[int, int]


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

  def __str__(self) -> str:
    return f"tiles of {self.tile_height}x{self.tile_width}"

  @property
  def tile(self) -> _Size:
    return self.tile_height, self.tile_width

  @property
  def stride(self) -> _Size:
    return self.stride_height, self.stride_width

  def covers(self, height: int, width: int) -> bool:
    """Whether one tile holds an image of so many pixels."""
    return height <= self.tile_height and width <= self.tile_width

  def check_multiples(self, factor: int) -> None:
    """Refuses sizes that are no whole numbers of latents.

    Args:
      factor: the autoencoder's spatial compression.

    Raises:
      ValueError: names the sizes.
    """
    if any(size % factor for size in self.tile + self.stride):
      raise ValueError(
        f"tiling: tiles {self.tile} and strides {self.stride} must be "
        f"multiples of {factor}, the autoencoder's spatial compression."
      )


def square(side: int) -> Tiling:
  """Returns tiles that overlap by an eighth, as published pipelines do."""
  stride = side * 7 // 8
  return Tiling(
    tile_height=side,
    tile_width=side,
    stride_height=stride,
    stride_width=stride,
  )


@dataclasses.dataclass(frozen=True)
class Grid:
  """Where the tiles of an array lie.

  Args:
    size: height and width of the array.
    tile: of a tile that the border does not cut.
    stride: from one tile to the next.
  """

  size: _Size
  tile: _Size
  stride: _Size

  @property
  def rows(self) -> range:
    return range(0, self.size[0], self.stride[0])

  @property
  def columns(self) -> range:
    return range(0, self.size[1], self.stride[1])

  def places(self) -> dict[Shape, list[_Size]]:
    """Lists the (row, column) of the tiles of every shape.

    There are few shapes, since only the last tiles of a row or column are cut.
    """
    places: dict[Shape, list[_Size]] = {}
    for row in self.rows:
      for column in self.columns:
        shape = (
          min(self.tile[0], self.size[0] - row),
          min(self.tile[1], self.size[1] - column),
        )
        places.setdefault(shape, []).append((row, column))
    return places

  def scaled(self, factor: int) -> "Grid":
    """The grid of the decoded tiles."""
    return Grid(
      *(
        (height * factor, width * factor)
        for height, width in (self.size, self.tile, self.stride)
      )
    )


def latent_grid(latents: Array, tiling: Tiling, factor: int) -> Grid:
  """Returns the grid of the tiles that latents are decoded in.

  Args:
    factor: the autoencoder's spatial compression.

  Raises:
    ValueError: sizes in `tiling` that are no multiples of it.
  """
  tiling.check_multiples(factor)
  return _latent_grid((latents.shape[1], latents.shape[2]), tiling, factor)


def split(
  x: Float[Array, "b h w c"], grid: Grid
) -> dict[Shape, Float[Array, "tiles b th tw c"]]:
  """Cuts tiles, those of the same shape together."""
  return {
    shape: jnp.stack(
      [
        x[:, row : row + shape[0], column : column + shape[1]]
        for row, column in places
      ]
    )
    for shape, places in grid.places().items()
  }


def join(
  tiles: Mapping[Shape, Float[Array, "tiles b th tw c"]], grid: Grid
) -> Float[Array, "b h w c"]:
  """Blends each tile into its blended neighbours above and to the left.

  In float32, whatever the tiles are in. Beside the tiles and the result, only
  the overlaps of one row are held: a tile is written where it belongs before
  the next one is looked at.

  Args:
    tiles: as `split` returns them for this grid.
  """
  tiles_at = {
    place: (shape, i)
    for shape, places in grid.places().items()
    for i, place in enumerate(places)
  }
  first = next(iter(tiles.values()))
  _, batch, _, _, channels = first.shape
  dtype = jnp.promote_types(first.dtype, jnp.float32)
  overlap = _difference(grid.tile, grid.stride)
  image = jnp.zeros((batch, *grid.size, channels), dtype)
  above: list[Array] = []
  for row in grid.rows:
    below: list[Array] = []
    left = None
    for j, column in enumerate(grid.columns):
      shape, i = tiles_at[row, column]
      tile = tiles[shape][i].astype(dtype)
      if above:
        tile = _blend(above[j], tile, overlap[0], axis=1)
      if left is not None:
        tile = _blend(left, tile, overlap[1], axis=2)
      kept = tile[:, : grid.stride[0], : grid.stride[1]]
      image = jax.lax.dynamic_update_slice(image, kept, (0, row, column, 0))
      below.append(_end(tile, overlap[0], axis=1))
      left = _end(tile, overlap[1], axis=2)
    above = below
  return image


def encode(
  autoencoder: dc_ae.DCAE, images: Float[Array, "b h w rgb"], tiling: Tiling
) -> Float[Array, "b h2 w2 c"]:
  """Encodes images, in tiles where they are larger than one.

  Images whose sides are no multiples of the compression are padded with zeros;
  the latents are cropped to whole multiples of the image. To be called under
  `jax.jit`, where it compiles one encoder per shape of tile.

  Raises:
    ValueError: sizes in `tiling` that are no multiples of the compression.
  """
  factor = autoencoder.spatial_compression
  tiling.check_multiples(factor)
  height, width = images.shape[1:3]
  if tiling.covers(height, width):
    return autoencoder.encode(images)
  padding = ((0, 0), (0, -height % factor), (0, -width % factor), (0, 0))
  padded = jnp.pad(images, padding)
  size = (padded.shape[1] // factor, padded.shape[2] // factor)
  grid = _latent_grid(size, tiling, factor)
  tiles = split(padded, grid.scaled(factor))
  encoded = {
    (shape[0] // factor, shape[1] // factor): jax.lax.map(
      autoencoder.encode, pieces
    )
    for shape, pieces in tiles.items()
  }
  return join(encoded, grid)[:, : height // factor, : width // factor]


def decode(
  autoencoder: dc_ae.DCAE, latents: Float[Array, "b h w c"], tiling: Tiling
) -> Float[Array, "b h2 w2 rgb"]:
  """Decodes latents, in tiles where the images are larger than one.

  To be called under `jax.jit`, where it compiles one decoder per shape of tile.

  Raises:
    ValueError: sizes in `tiling` that are no multiples of the compression.
  """
  factor = autoencoder.spatial_compression
  grid = latent_grid(latents, tiling, factor)
  if tiling.covers(latents.shape[1] * factor, latents.shape[2] * factor):
    return autoencoder.decode(latents)
  decoded = {
    (shape[0] * factor, shape[1] * factor): jax.lax.map(
      autoencoder.decode, pieces
    )
    for shape, pieces in split(latents, grid).items()
  }
  return join(decoded, grid.scaled(factor))


def _latent_grid(size: _Size, tiling: Tiling, factor: int) -> Grid:
  tile, stride = (
    (height // factor, width // factor)
    for height, width in (tiling.tile, tiling.stride)
  )
  return Grid(size, tile, stride)


def _difference(a: _Size, b: _Size) -> _Size:
  return a[0] - b[0], a[1] - b[1]


def _end(x: Array, extent: int, *, axis: int) -> Array:
  """Returns the last `extent` rows or columns, all if there are fewer."""
  start = max(x.shape[axis] - extent, 0)
  return jax.lax.slice_in_dim(x, start, None, axis=axis)


def _blend(before: Array, after: Array, extent: int, *, axis: int) -> Array:
  """Fades from the end of `before` to `after`: a (1 - k/E) + b k/E.

  E is `extent`, or a whole tile that is smaller. A tile that the image's border
  cuts overlaps its neighbour by less: published models fade over E all the
  same, and so does this.
  """
  extent = min(before.shape[axis], after.shape[axis], extent)
  if not extent:
    return after
  old = _end(before, extent, axis=axis)
  new = jax.lax.slice_in_dim(after, 0, extent, axis=axis)
  rest = jax.lax.slice_in_dim(after, extent, None, axis=axis)
  ramp = jnp.arange(extent, dtype=after.dtype) / extent
  ramp = ramp.reshape([-1 if i == axis else 1 for i in range(after.ndim)])
  return jnp.concatenate([old * (1 - ramp) + new * ramp, rest], axis=axis)
