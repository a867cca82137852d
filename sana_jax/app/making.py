"""Makes the images of one request after the other, on the devices."""

import io
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import PIL.Image
from absl import logging
from etils import epath

from sana_jax import images as images_lib
from sana_jax import pipeline as pipeline_lib
from sana_jax.app import preview as preview_lib
from sana_jax.app import requests, solvers
from sana_jax.app.adapters import Adapters
from sana_jax.app.jobs import Result, Update
from sana_jax.bulk import decodings, metadata, plan
from sana_jax.pipeline.output import SanaOutput

_STAGES = {
  "text encoder": "encode",
  "encoder": "encode",
  "transformer": "denoise",
  "decoder": "decode",
}
# What a preview is fitted to; many colours and shapes.
_WARM_UP_PROMPTS = (
  *("a red apple", "a blue sea under a white sky", "a green forest"),
  *("a yellow sun", "a black cat", "a white house", "a portrait", "a purple"),
  *("an orange fruit", "a grey stone", "a pink flower", "a brown dog"),
  *("a city at night", "a face", "a snowy mountain", "a car"),
)

PostFn = Callable[[Update], None]


class Maker:
  """Owns a pipeline; for one thread.

  Every request finds it as it was at the beginning, whatever the one before
  had changed.

  Args:
    made_with: see `metadata.describe_run`; None: nothing is known of the
      checkpoint.
  """

  def __init__(
    self,
    pipe: pipeline_lib.SanaPipeline,
    adapters: Adapters,
    made_with: Mapping[str, Any] | None,
  ):
    self._pipe = pipe
    self._adapters = adapters
    self._solvers = solvers.of(pipe.solver)
    self._own_solver = type(pipe.solver).__name__
    self.made_with = made_with or metadata.describe_run(
      pipe, epath.Path("unknown"), {"checkpoint_sha256": "unknown"}, {}
    )
    self._preview: preview_lib.Preview | None = None

  def make(self, request: requests.GenerationRequest, post: PostFn) -> Result:
    """Makes the images of a checked request that has a seed.

    Args:
      post: is told of every stage and step; what it raises ends the work.
    """
    description = self._describe(request)
    output = self._run(request, post)
    description[metadata.TEXT_LENGTH] = output.text_length
    pngs = []
    for number, pixels in enumerate(output.images, request.image_index):
      chunks = metadata.png_chunks(
        description | {"image_index": number}, pixels.shape
      )
      pngs.append(images_lib.encode_png(pixels, chunks))
    return Result(
      [_opened(png) for png in pngs],
      pngs,
      request.seed,
      request.settings(),
    )

  def warm_up(self, check_stopped: Callable[[], None]) -> None:
    """Compiles what a request without settings needs, and fits the preview."""
    started = time.monotonic()

    def post(update: Update) -> None:
      del update
      check_stopped()

    outputs: list[SanaOutput] = []
    for seed, prompt in enumerate(_WARM_UP_PROMPTS):
      outputs.append(self._run(self._plain_request(prompt, seed), post))
      if seed == 0:
        logging.info(
          "the first image took %.1f s, compilation included",
          time.monotonic() - started,
        )
        self._warm_up_longer_texts(post)
      latents = np.concatenate([out.latents for out in outputs])
      if preview_lib.enough(latents):
        break
    self._preview = preview_lib.fit(
      latents, np.concatenate([out.images for out in outputs])
    )
    logging.info(
      "warmed up in %.1f s; previews explain %.0f %% of %d images",
      time.monotonic() - started,
      100 * self._preview.explained,
      len(outputs),
    )

  def _warm_up_longer_texts(self, post: PostFn) -> None:
    """Compiles what prompts need that are too long for a `text_length`."""
    most = self._pipe.generation_config.max_sequence_length
    for length in self._pipe.text_lengths:
      if length < most:
        # A token a word, and one that begins every text.
        prompt = " ".join(["a"] * length)
        self._run(self._plain_request(prompt, seed=0), post)

  def _plain_request(
    self, prompt: str, seed: int
  ) -> requests.GenerationRequest:
    """Returns one of the checkpoint's own size; a ControlNet follows grey."""
    size = self._pipe.image_size()
    sides = (size.width, size.height)
    return requests.GenerationRequest(
      prompt=prompt,
      seed=seed,
      width=size.width,
      height=size.height,
      control_image=None
      if self._pipe.controlnet is None
      else PIL.Image.new("RGB", sides, "grey"),
    )

  def _run(
    self, request: requests.GenerationRequest, post: PostFn
  ) -> SanaOutput:
    pipe = self._pipe
    last = Update("encode")

    def advance(**changes) -> None:
      nonlocal last
      last = last._replace(**changes)
      post(last)

    def on_progress(event: pipeline_lib.Progress) -> None:
      if event.seconds is None:
        advance(stage=_STAGES[event.stage], compiling=event.phase == "compile")

    def on_step(step: int, num_steps: int, latents: np.ndarray) -> None:
      shown = None if self._preview is None else self._preview(latents)
      advance(step=step, num_steps=num_steps, preview=shown)

    # Set for every request, so that nothing of the one before is left.
    pipe.transformer = self._adapters.transformer(
      request.lora, request.lora_scale
    )
    pipe.solver = self._solvers[request.solver or self._own_solver]
    return pipe(
      request.prompt,
      negative_prompt=request.negative_prompt,
      seed=request.seed,
      image_index=request.image_index,
      num_images_per_prompt=request.num_images,
      progress=on_progress,
      on_step=on_step,
      **request.pictures(),
      **request.changes(),
    )

  def _describe(self, request: requests.GenerationRequest) -> dict[str, Any]:
    pictures = request.pictures()
    settings = self._pipe.generation_config.replace(request.changes())
    planned = self._pipe.plan_memory(
      1, request.num_images, settings, num_encoded=min(len(pictures), 1)
    )
    image = plan.Image(
      index=0,
      prompt=request.prompt,
      negative_prompt=request.negative_prompt,
      seed=request.seed,
      image_index=request.image_index,
      settings=request.changes(),
      # No path: making the image again takes the same picture.
      pictures=dict.fromkeys(pictures, "uploaded"),
    )
    return metadata.describe_image(
      self._pipe,
      image,
      {
        **self.made_with,
        **self._adapters.describe(request.lora, request.lora_scale),
        "solver": request.solver or self._own_solver,
        decodings.NAME: decodings.describe(planned.decoding.cut),
        "batch_size": request.num_images,
      },
    )


def _opened(png: bytes) -> PIL.Image.Image:
  image = PIL.Image.open(io.BytesIO(png))
  image.load()
  return image
