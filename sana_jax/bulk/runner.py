"""Runs a plan: makes batches, and writes them while the next one is made."""

import dataclasses
import hashlib
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Float

from sana_jax import images as images_lib
from sana_jax import pipeline as pipeline_lib
from sana_jax.bulk import decodings as decodings_lib
from sana_jax.bulk import inputs, metadata, requests, sinks
from sana_jax.bulk import manifest as manifest_lib
from sana_jax.bulk import plan as plan_lib
from sana_jax.pipeline import checks, options
from sana_jax.pipeline import meter as meter_lib
from sana_jax.pipeline.best_of import Scorer


class Made(NamedTuple):
  """An image that came out of the pipeline."""

  image: plan_lib.Image
  pixels: Float[np.ndarray, "h w 3"]
  details: Mapping[str, Any]


class Selection(NamedTuple):
  """Of each image `count` candidates are made; see `pipeline.best_of`."""

  count: int
  scorer: Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runner:
  """Everything that a run needs.

  Attributes:
    description: see `metadata.describe_run`.
    decodings: those that the plan was checked with.
    selection: None: each image is the only candidate.
    stop: says whether to end after the unit at hand.
    on_unit: called with the names of the files of a finished unit.
  """

  plan: plan_lib.Plan
  pipe: pipeline_lib.SanaPipeline
  sink: sinks.Sink
  manifest: manifest_lib.Manifest
  meter: meter_lib.Meter
  description: Mapping[str, Any]
  decodings: decodings_lib.Decodings
  selection: Selection | None
  stop: Callable[[], bool]
  on_unit: Callable[[Sequence[str]], None]

  def run(self) -> list[int]:
    """Makes what the manifest does not have; returns the images that failed.

    Raises:
      OSError: something cannot be written.
    """
    failed: list[int] = []
    # One thread writes, in order; encoding, which takes longer, has many.
    with (
      futures.ThreadPoolExecutor(1) as background,
      futures.ThreadPoolExecutor(os.cpu_count()) as encoders,
    ):
      written: list[futures.Future] = []
      # Where this process began must not show: in batches of one size, what
      # the encoder makes of a prompt does not depend on the others.
      self.pipe.prompt_batch_size = self.plan.batch_size
      for number in self.manifest.units_to_do:
        if self.stop():
          break
        unit = _UnitRun(self, self.plan.unit(number), encoders)
        failed += unit.make(background, written)
      _wait(written)
    return failed

  def make_images(self, batch: plan_lib.Batch) -> list[Made]:
    """Runs the pipeline on a batch.

    Raises:
      FloatingPointError: an image came out as no number.
      ValueError: a picture to begin with cannot be read, or the pipeline
        refuses its arguments.
    """
    images = batch.images
    decoding = self.decodings.plan(images[0].settings, batch.size).decoding
    how = {decodings_lib.NAME: decodings_lib.describe(decoding.cut)}
    if self.selection is not None:
      return [self._best(image, self.selection, how) for image in images]
    # Filled up, so that the last batch needs no compilation of its own.
    filled = images + images[-1:] * (batch.size - len(images))
    loaded = self._load_pictures(filled)
    output = self.pipe(
      [image.prompt for image in filled],
      negative_prompt=[image.negative_prompt for image in filled],
      seed=[image.seed for image in filled],
      image_index=[image.image_index for image in filled],
      progress=self.meter.event,
      **loaded.arrays,
      **images[0].settings,
    )
    alike = {
      "batch_size": batch.size,
      metadata.TEXT_LENGTH: output.text_length,
    }
    return [
      Made(image, pixels, {**digests, **how, **alike})
      for image, pixels, digests in zip(
        images, output.images, loaded.digests, strict=False
      )
    ]

  def _best(
    self,
    image: plan_lib.Image,
    selection: Selection,
    how: Mapping[str, Any],
  ) -> Made:
    """Makes the candidates of an image, and returns the best.

    It gets the number of that candidate, which makes it again.

    Args:
      how: it is decoded.
    """
    loaded = self._load_pictures([image])
    best = pipeline_lib.best_of(
      self.pipe,
      [image.prompt],
      n=selection.count,
      scorer=selection.scorer,
      negative_prompt=image.negative_prompt,
      seed=image.seed,
      image_index=image.image_index * selection.count,
      progress=self.meter.event,
      **loaded.arrays,
      **image.settings,
    )
    return Made(
      image._replace(image_index=int(best.image_index[0])),
      best.output.images[0],
      {
        **loaded.digests[0],
        **how,
        "batch_size": selection.count,
        metadata.TEXT_LENGTH: best.output.text_length,
        "score": float(best.scores.max()),
      },
    )

  def _load_pictures(self, images: Sequence[plan_lib.Image]) -> inputs.Loaded:
    settings = self.pipe.generation_config.replace(images[0].settings)
    size = self.pipe.image_size(settings)
    return inputs.load([image.pictures for image in images], size.generated)


def resolve_settings(
  pipe: pipeline_lib.SanaPipeline,
  request: requests.Request,
  ratio: float | None,
) -> requests.Settings:
  """Returns a request's settings, with the size that its image gives.

  Args:
    ratio: height / width of the image to begin with.

  Raises:
    TypeError: there is no such setting.
    ValueError: what the pipeline would refuse.
  """
  changes = dict(request.settings)
  options.check_applicable(changes, is_sprint=pipe.is_sprint)
  negatives = checks.negative_prompt_list(
    request.negative_prompt, 1, is_sprint=pipe.is_sprint
  )
  settings = pipe.generation_config.replace(changes)
  paths = dict(request.pictures)
  image, mask, control = (paths.get(name) for name in inputs.NAMES)
  checks.check_effective(changes, settings, negatives, (image, mask, control))
  checks.check_control(pipe.controlnet, control)
  options.pag_layers(settings, pipe.transformer_config.num_layers)
  size = pipe.image_size(settings, ratio=ratio)
  pipe.make_schedule(settings)
  if ratio is None or settings.aspect is not None:
    return request.settings
  # Said outright, so that images of different sizes may share a batch.
  fixed = changes | {"height": size.height, "width": size.width}
  return tuple(sorted(fixed.items()))


def load_scorer(name: str) -> Scorer:
  """Imports a function that is named like "package.module:function".

  Raises:
    ValueError: there is no such function.
  """
  module, _, function = name.partition(":")
  try:
    scorer = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError, ValueError) as error:
    raise ValueError(
      f'scorer is {name!r}; expected "module:function": {error}.'
    ) from error
  if not callable(scorer):
    raise ValueError(f"scorer {name!r} is no function, but {scorer!r}.")
  return scorer


class _UnitRun:
  """Makes one unit; what it writes, another thread writes."""

  def __init__(
    self,
    runner: Runner,
    unit: plan_lib.Unit,
    encoders: futures.ThreadPoolExecutor,
  ):
    self._runner = runner
    self._unit = unit
    self._encoders = encoders
    self._writer = runner.sink(unit.number)
    self._lines: list[dict[str, Any]] = []

  def make(
    self,
    background: futures.ThreadPoolExecutor,
    written: list[futures.Future],
  ) -> list[int]:
    """Makes all batches; returns the images that failed.

    Args:
      written: the writing that is under way.
    """
    failed: list[int] = []
    parts: list[futures.Future] = []
    try:
      for batch in self._unit.batches:
        try:
          made = self._runner.make_images(batch)
        except (FloatingPointError, ValueError) as error:
          failed += [image.index for image in batch.images]
          parts.append(background.submit(self._fail, batch, str(error)))
          written.append(parts[-1])
          continue
        self._runner.meter.batch_done(len(batch.images))
        # At most one batch waits, lest they fill the memory.
        _wait(written)
        parts.append(background.submit(self._write, made))
        written.append(parts[-1])
      written.append(background.submit(self._finish, parts))
    except BaseException:
      futures.wait(written)
      self._writer.discard()
      raise
    return failed

  def _write(self, batch: Sequence[Made]) -> None:
    samples = self._encoders.map(self._encode, batch)
    for made, sample in zip(batch, samples, strict=True):
      self._writer.add(sample)
      digest = hashlib.sha256(sample.png).hexdigest()
      how = {decodings_lib.NAME: made.details[decodings_lib.NAME]}
      self._lines.append(_line(made.image) | how | {"sha256": digest})

  def _encode(self, made: Made) -> sinks.Sample:
    image, pixels, details = made
    description = metadata.describe_image(
      self._runner.pipe, image, {**self._runner.description, **details}
    )
    png = images_lib.encode_png(
      pixels, metadata.png_chunks(description, pixels.shape)
    )
    text = json.dumps(description, ensure_ascii=False)
    return sinks.Sample(image.index, image.prompt, png, text.encode())

  def _fail(self, batch: plan_lib.Batch, reason: str) -> None:
    indices = [image.index for image in batch.images]
    logging.error("images %s failed: %s", indices, reason)
    self._lines += [_line(image) | {"error": reason} for image in batch.images]

  def _finish(self, parts: Sequence[futures.Future]) -> None:
    for part in parts:
      part.result()  # a unit with a part that is not written is not finished
    stored = iter(self._writer.finish())
    for line in self._lines:
      if "sha256" in line:
        place = next(stored)
        line |= place._asdict()
    self._runner.manifest.append(self._unit.number, self._lines)
    files = {line["file"]: None for line in self._lines if "file" in line}
    self._runner.on_unit(list(files))


def _line(image: plan_lib.Image) -> dict[str, Any]:
  return {
    "index": image.index,
    "prompt": image.prompt,
    "negative_prompt": image.negative_prompt,
    "seed": image.seed,
    "image_index": image.image_index,
    "settings": image.settings,
    **image.pictures,
  }


def _wait(written: list[futures.Future]) -> None:
  """Waits for what is being written, and raises what went wrong there."""
  while written:
    written.pop(0).result()
