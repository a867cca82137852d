"""What one client may ask of a service, and all clients together."""

import dataclasses

from sana_jax import pipeline as pipeline_lib

# Times the area that a checkpoint was trained at.
PIXELS_PER_NATIVE = 2
# What every reader of a limit can count to.
_MOST = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Bounds of requests, uploads and the queue.

  Attributes:
    max_images: of one request.
    max_pixels: of one image; None: twice what the checkpoint was trained at.
    max_prompt_characters: of the prompt, and of the negative prompt.
    max_steps: calls of the transformer.
    max_upload_bytes: of one picture, as it is sent.
    max_upload_pixels: of one picture.
    max_waiting: requests that wait.
    max_waiting_per_client: of which those of one client.
  """

  max_images: int = 4
  max_pixels: int | None = None
  max_prompt_characters: int = 2000
  max_steps: int = 100
  max_upload_bytes: int = 20_000_000
  max_upload_pixels: int = 4096 * 4096
  max_waiting: int = 32
  max_waiting_per_client: int = 8

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if value is None and field.name == "max_pixels":
        continue
      whole = isinstance(value, int) and not isinstance(value, bool)
      if not whole or not 1 <= value <= _MOST:
        raise ValueError(
          f"{field.name} must be a whole number from 1 to {_MOST}, got "
          f"{value!r}."
        )

  def of(self, pipe: pipeline_lib.SanaPipeline) -> "Limits":
    """Returns these limits with those that depend on the checkpoint."""
    if self.max_pixels is not None:
      return self
    native = pipe.image_size(pipeline_lib.GenerationConfig())
    return dataclasses.replace(
      self, max_pixels=PIXELS_PER_NATIVE * native.height * native.width
    )
