"""What a call of a pipeline asks for, checked before anything is computed."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from sana_jax import text
from sana_jax.diffusion import schedules
from sana_jax.pipeline import (
  checks,
  denoising,
  options,
  sizes,
  stages,
  starts,
)

if TYPE_CHECKING:
  from sana_jax.pipeline.text_to_image import SanaPipeline


class Job(NamedTuple):
  """The arguments of a call, resolved.

  Attributes:
    text_length: in the place of `max_sequence_length`: the padding that no
      prompt of the call needs is left out.
  """

  settings: options.GenerationConfig
  prompts: list[str]
  negatives: list[str]
  text_length: int
  size: sizes.ImageSize
  start: starts.Start
  control: Float[np.ndarray, "n height width 3"] | None
  schedule: schedules.Schedule
  latents: Float[ArrayLike, "n h w c"]
  noise: Float[ArrayLike, "steps n h w c"] | None

  @property
  def num_encoded(self) -> int:
    """How many pictures are encoded at a time, at most."""
    given = (self.start.image, self.control)
    return max(0 if array is None else len(array) for array in given)

  def begin(
    self, encode: Callable[[np.ndarray], Array], *, on_circle: bool
  ) -> tuple[ArrayLike, denoising.Known | None, Array | None]:
    """Returns the first latents, what of the image stays, and the control.

    Args:
      encode: images in [0, 1] to latents.
      on_circle: as in `denoising.add_noise`.
    """

    def encode_for_all(images):
      # One picture for all images is encoded once.
      encoded = encode(images)
      return jnp.broadcast_to(encoded, (len(self.latents), *encoded.shape[1:]))

    latents, known = self.latents, None
    if self.start.image is not None:
      clean = encode_for_all(self.start.image)
      known = self.start.known(clean, latents)
      latents = denoising.add_noise(
        clean, latents, self.schedule, on_circle=on_circle
      )
    if self.control is None:
      return latents, known, None
    return latents, known, encode_for_all(self.control)


def resolve(
  pipe: "SanaPipeline",
  prompt: str | Sequence[str],
  negative_prompt: str | Sequence[str],
  changes: Mapping[str, Any],
  *,
  pictures: tuple[Any, Any, Any],
  numbers: tuple[Any, Any, int],
  times: tuple[Any, Any],
  random: tuple[Any, Any],
) -> Job:
  """Checks the arguments of `SanaPipeline.__call__`, which describes them.

  Args:
    pictures: (image, mask_image, control_image).
    numbers: (seed, image_index, num_images_per_prompt).
    times: (sigmas, timesteps).
    random: (latents, noise).
  """
  settings = pipe.generation_config.replace(changes)
  options.check_applicable(changes, is_sprint=pipe.is_sprint)
  prompts = checks.prompt_list(prompt)
  image, mask_image, control_image = pictures
  seed, image_index, num_images_per_prompt = numbers
  count = checks.image_count(prompts, num_images_per_prompt)
  negatives = checks.negative_prompt_list(
    negative_prompt, len(prompts), is_sprint=pipe.is_sprint
  )
  checks.check_effective(changes, settings, negatives, pictures)
  checks.check_custom_times(pipe.solver, changes, *times)
  checks.check_control(pipe.controlnet, control_image)
  shown = control_image if image is None else image
  size = pipe.image_size(settings, ratio=starts.ratio(shown))
  checks.warn_if_untrained(
    settings,
    size.grid,
    pipe.transformer_config,
    compression=size.compression,
    is_sprint=pipe.is_sprint,
  )
  start = starts.read(image, mask_image, size, count)
  schedule = pipe.make_schedule(
    settings,
    sigmas=times[0],
    timesteps=times[1],
    strength=start.strength(settings, is_sprint=pipe.is_sprint),
  )
  latents, noise = stages.random_inputs(
    stages.image_keys(*checks.image_numbers(seed, image_index, count)),
    (*size.grid, pipe.transformer_config.in_channels),
    schedule,
    latents=random[0],
    noise=random[1],
  )
  return Job(
    settings,
    prompts,
    negatives,
    _text_length(pipe, settings, prompts, negatives),
    size,
    start,
    starts.read_picture(control_image, size, count, name="control_image"),
    schedule,
    latents,
    noise,
  )


def _text_length(
  pipe: "SanaPipeline",
  settings: options.GenerationConfig,
  prompts: Sequence[str],
  negatives: Sequence[str],
) -> int:
  """Picks the fewest tokens that hold the longest text of a call.

  What is masked has no influence, so the images are the same up to rounding.
  """
  needed = text.prompt_lengths(
    pipe.tokenizer,
    prompts,
    complex_human_instruction=settings.complex_human_instruction,
    lowercase=settings.lowercase,
  )
  if options.is_guided(settings, is_sprint=pipe.is_sprint):
    needed += text.prompt_lengths(
      pipe.tokenizer, negatives, lowercase=settings.lowercase
    )
  most = settings.max_sequence_length
  return min(
    (n for n in pipe.text_lengths if max(needed) <= n < most), default=most
  )
