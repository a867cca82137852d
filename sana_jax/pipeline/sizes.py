"""How large a picture becomes, and the latent grid it is made from."""

from typing import NamedTuple

from sana_jax import config, resolution
from sana_jax.pipeline import checks, options


class ImageSize(NamedTuple):
  """Pixels of the finished image, and the latent grid it is made from."""

  height: int
  width: int
  latent_height: int
  latent_width: int
  compression: int

  @property
  def grid(self) -> tuple[int, int]:
    return self.latent_height, self.latent_width

  @property
  def generated(self) -> tuple[int, int]:
    """Pixels (height, width) of the decoded image, before it is fitted."""
    height, width = (side * self.compression for side in self.grid)
    return height, width


def resolve(
  settings: options.GenerationConfig,
  transformer: config.SanaConfig,
  autoencoder: config.DCAEConfig,
  *,
  ratio: float | None = None,
) -> ImageSize:
  """Works out the size of an image.

  Args:
    ratio: height / width, where the settings say nothing of the size.

  Raises:
    ValueError: a size that cannot be, or bins that do not exist.
  """
  compression = autoencoder.spatial_compression
  sample_size = transformer.sample_size
  side, multiple = (
    compression * n for n in (sample_size, transformer.patch_size)
  )
  binning = settings.use_resolution_binning
  if binning is None:
    bins_fit = compression == resolution.COMPRESSION
    binning = bins_fit and sample_size in resolution.SAMPLE_SIZES
  height, width = settings.height, settings.width
  if settings.aspect is not None:
    ratio = resolution.parse_aspect(settings.aspect)
  if height is None and width is None and ratio is not None:
    height, width = (
      resolution.closest_bin(ratio, sample_size)
      if binning
      else resolution.same_area(ratio, side, multiple)
    )
  height = side if height is None else height
  width = side if width is None else width
  checks.check_size(height, width, 1 if binning else multiple)
  generated = (height, width)
  if binning:
    generated = resolution.closest_bin(height / width, sample_size)
  grid = (generated[0] // compression, generated[1] // compression)
  return ImageSize(height, width, *grid, compression)
