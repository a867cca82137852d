"""What a pipeline returns."""

import dataclasses

import numpy as np
import PIL.Image
from jaxtyping import ArrayLike, Float

from sana_jax import images as images_lib


@dataclasses.dataclass(frozen=True)
class SanaOutput:
  """What a call returns, on the host.

  Attributes:
    images: in [0, 1].
    latents: in the transformer's scale.
    text_length: how many tokens of text the transformer read, padding included.
  """

  images: Float[np.ndarray, "n height width 3"]
  latents: Float[np.ndarray, "n h w c"]
  text_length: int

  def pil(self) -> list[PIL.Image.Image]:
    return images_lib.to_pil(self.images)


def fetch(
  images: Float[ArrayLike, "n height width 3"],
  latents: Float[ArrayLike, "n h w c"],
  text_length: int,
) -> SanaOutput:
  """Brings to the host what a call made."""
  return SanaOutput(np.asarray(images), np.asarray(latents), text_length)
