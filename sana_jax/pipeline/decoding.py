"""Pictures to latents and back: whole or cut, on one device or many."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from sana_jax import resolution
from sana_jax.models import tiling as tiling_lib
from sana_jax.models import windows as windows_lib
from sana_jax.pipeline import execution, stages

_STAGE = "decoder"


class Decoding(NamedTuple):
  """How a batch of latents is decoded, and one of images encoded.

  Attributes:
    tiling: None: no tiles, which are decoded one at a time by each device.
    one_at_a_time: each device decodes its images one by one.
    windows: None: no windows. With them images are decoded one by one, too;
      they are encoded whole.
  """

  tiling: tiling_lib.Tiling | None = None
  one_at_a_time: bool = False
  windows: windows_lib.Windows | None = None

  @property
  def cut(self) -> tiling_lib.Tiling | windows_lib.Windows | None:
    """What images are cut into; None: whole images."""
    return self.windows if self.tiling is None else self.tiling

  @property
  def separate(self) -> bool:
    """Whether images do not share a batch of the autoencoder's."""
    return self.one_at_a_time or self.cut is not None


def encode(
  *,
  autoencoder: Any,
  images: Float[Array, "b height width 3"],
  scaling_factor: float,
  how: Decoding,
) -> Float[Array, "b h w c"]:
  """Encodes images in [0, 1] to latents in the transformer's scale."""

  def encode_batch(batch):
    batch = 2 * batch - 1
    if how.tiling is None:
      latents = autoencoder.encode(batch)
    else:
      latents = tiling_lib.encode(autoencoder, batch, how.tiling)
    return latents.astype(jnp.float32) * scaling_factor

  if not how.separate:
    return encode_batch(images)
  return jax.lax.map(lambda image: encode_batch(image[None])[0], images)


def decode(
  executor: execution.Executor,
  autoencoder: Any,
  latents: Float[ArrayLike, "b h w c"],
  *,
  how: Decoding,
  scaling_factor: float,
  height: int,
  width: int,
  progress: execution.ProgressFn | None = None,
) -> Float[Array, "b height width 3"]:
  """Decodes latents, fits the images to a size, and maps them to [0, 1].

  Images are spread over all devices; or tiles, whatever image they belong to,
  which are blended on the first device.
  """
  size = {"height": height, "width": width}
  if how.tiling is None:
    return executor.run(
      _STAGE,
      decode_whole,
      shared={"autoencoder": autoencoder},
      batched={"latents": latents},
      static=size
      | {
        "scaling_factor": scaling_factor,
        "one_at_a_time": how.separate,
        "windows": how.windows,
      },
      progress=progress,
    )
  latents = jnp.asarray(latents)
  factor = autoencoder.spatial_compression
  grid = tiling_lib.latent_grid(latents, how.tiling, factor)
  decoded = {}
  for shape, tiles in tiling_lib.split(latents, grid).items():
    count, batch = tiles.shape[:2]
    pixels = executor.run(
      _STAGE,
      decode_tiles,
      shared={"autoencoder": autoencoder},
      batched={"latents": tiles.reshape(count * batch, *tiles.shape[2:])},
      static={"scaling_factor": scaling_factor},
      progress=progress,
    )
    key = (shape[0] * factor, shape[1] * factor)
    decoded[key] = pixels.reshape(count, batch, *pixels.shape[1:])
  return executor.run_on_first(
    _STAGE,
    join_tiles,
    arguments={"tiles": decoded},
    static=size | {"grid": grid.scaled(factor)},
    progress=progress,
  )


def decode_whole(
  *,
  autoencoder: Any,
  latents: Float[Array, "b h w c"],
  scaling_factor: float,
  one_at_a_time: bool,
  height: int,
  width: int,
  windows: windows_lib.Windows | None = None,
) -> Float[Array, "b height width 3"]:
  """Decodes whole images, if need be in windows, and finishes them."""

  def decode_batch(batch):
    images = stages.decode_raw(
      autoencoder=autoencoder,
      latents=batch,
      scaling_factor=scaling_factor,
      tiling=windows,
    )
    return _finish(images, height, width)

  if not one_at_a_time:
    return decode_batch(latents)
  return jax.lax.map(lambda latent: decode_batch(latent[None])[0], latents)


def decode_tiles(
  *,
  autoencoder: Any,
  latents: Float[Array, "tiles h w c"],
  scaling_factor: float,
) -> Float[Array, "tiles h2 w2 3"]:
  """Decodes tiles one at a time, in the autoencoder's own dtype and range."""
  return jax.lax.map(
    lambda z: autoencoder.decode(z[None] / scaling_factor)[0], latents
  )


def join_tiles(
  *,
  tiles: Mapping[tiling_lib.Shape, Float[Array, "tiles b h w 3"]],
  grid: tiling_lib.Grid,
  height: int,
  width: int,
) -> Float[Array, "b height width 3"]:
  """Blends decoded tiles, and finishes the images."""
  return _finish(tiling_lib.join(tiles, grid), height, width)


def _finish(images, height: int, width: int):
  return stages.to_unit(resolution.cover_and_crop(images, height, width))
