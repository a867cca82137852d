"""What a pipeline returns."""

import dataclasses

import numpy as np
import PIL.Image
from jaxtyping import Float

from sana_jax import images as images_lib


@dataclasses.dataclass(frozen=True)
class SanaOutput:
  """What a call returns, on the host.

  Attributes:
    images: in [0, 1].
    latents: in the transformer's scale.
  """

  images: Float[np.ndarray, "n height width 3"]
  latents: Float[np.ndarray, "n h w c"]

  def pil(self) -> list[PIL.Image.Image]:
    return images_lib.to_pil(self.images)
