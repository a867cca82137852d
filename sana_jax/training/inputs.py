"""Four ways to a batch that a transformer is trained on.

The bundled emoji are encoded once and stay in memory; pictures are decoded on
the host and encoded in the step; a cache holds latents and text states, or
latents alone, and noise may stand for them. Each way says how batches are read,
and what the step makes of one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array, Bool, Float

from sana_jax import config as config_lib
from sana_jax import resolution
from sana_jax import text as text_lib
from sana_jax.data import (
  buckets,
  cache_manifest,
  examples,
  loader,
  opening,
  readers,
  synthetic,
)
from sana_jax.data import cache as cache_lib
from sana_jax.data import names as names_lib
from sana_jax.models import dc_ae
from sana_jax.pipeline import options
from sana_jax.training import ledger as ledger_lib
from sana_jax.training import scans
from sana_jax.weights import files


class Conditions(NamedTuple):
  """What the loss needs of a batch.

  Attributes:
    latents: scaled, so that they have about unit variance.
    null_text: of the empty caption.
  """

  latents: Float[Array, "b h w c"]
  text: Float[Array, "b l d"]
  text_mask: Bool[Array, "b l"]
  null_text: Float[Array, "1 l d"]
  null_text_mask: Bool[Array, "1 l"]


ConditionFn = Callable[
  [Any, Any, Any, config_lib.TextToImageConfig], Conditions
]
"""(params, frozen, batch, config) -> Conditions, inside the step."""


class Inputs(NamedTuple):
  """One way to a batch.

  Attributes:
    batches: see `loader.HostBatches`.
    frozen: arrays that `condition` needs beside the batch.
    condition: see `ConditionFn`.
    encodes_text: whether `condition` needs a text encoder.
    num_shapes: how many there are.
    size_of: a batch -> the (height, width) of its pictures.
    name_batch: see `names.NameBatch`; None: records have no names.
    ledger: of sources that may change, or be used in part.
  """

  batches: loader.HostBatches
  frozen: dict[str, Any]
  condition: ConditionFn
  encodes_text: bool
  num_shapes: int
  size_of: Callable[[dict[str, Any]], tuple[int, int]]
  name_batch: names_lib.NameBatch | None = None
  ledger: ledger_lib.Ledger | None = None


def from_emoji(
  config: config_lib.TextToImageConfig,
  autoencoder: dc_ae.DCAE,
  autoencoder_config: config_lib.DCAEConfig,
  tokenize: readers.TokenizeFn,
) -> Inputs:
  """Encodes all emoji once."""
  logging.info("encoding the %s images", config.data.split)
  latents = encode_images(autoencoder, config.data)
  dataset = examples.caption_examples(
    config.data,
    config.seed,
    latents * np.float32(autoencoder_config.scaling_factor),
    lambda caption: {k: v[0] for k, v in tokenize([caption]).items()},
  )
  side = config.data.image_size
  return Inputs(
    loader.example_batches(dataset, config.batch_size),
    frozen={},
    condition=tokens_to_conditions,
    encodes_text=True,
    num_shapes=1,
    size_of=lambda batch: (side, side),
    name_batch=names_lib.of_examples(
      examples.names(config.data, config.seed), config.batch_size
    ),
  )


def from_pictures(
  config: config_lib.TextToImageConfig,
  autoencoder: dc_ae.DCAE,
  autoencoder_config: config_lib.DCAEConfig,
  tokenize: readers.TokenizeFn,
  workdir: epath.PathLike | None = None,
) -> Inputs:
  """Opens the sources; their pictures are encoded in the step.

  Args:
    workdir: of the run, whose `scans/` keeps the sizes of pictures.

  Raises:
    FileNotFoundError, ValueError: a source cannot be read, or used.
  """
  opened = opening.open_pictures(
    config.data,
    multiple=autoencoder_config.spatial_compression * config.model.patch_size,
    tokenize=tokenize,
    batch_size=config.batch_size,
    seed=config.seed,
    find_scan=scans.shared(
      None if workdir is None else epath.Path(workdir) / "scans"
    ),
  )
  return Inputs(
    opened.batches,
    frozen={"autoencoder": autoencoder},
    condition=functools.partial(
      images_to_conditions, scaling_factor=autoencoder_config.scaling_factor
    ),
    encodes_text=True,
    num_shapes=len(opened.shapes),
    size_of=lambda batch: batch["images"].shape[1:3],
    name_batch=opened.name_batch,
    ledger=_ledger(opened, config),
  )


def from_cache(
  config: config_lib.TextToImageConfig,
  autoencoder_config: config_lib.DCAEConfig,
  generation: options.GenerationConfig,
  tokenize: readers.TokenizeFn,
) -> Inputs:
  """Opens a cache of latents, and of text states if it has any.

  Args:
    tokenize: for one without; its captions are encoded in the step.

  Raises:
    FileNotFoundError: it is not there, or not complete.
    ValueError: it was made otherwise than this run needs it.
  """
  source = cache_lib.CachedSource(config.data.cache)
  manifest = source.manifest
  check_cache(manifest, config, autoencoder_config, generation)
  made = manifest.settings
  if config.data.buckets == "aspect" and len(made.buckets) == 1:
    logging.warning(
      "%s has one shape, %dx%d, though data.buckets is 'aspect': made with "
      "--buckets=square, or with fewer than --min_pictures of all others",
      *(source.name, *made.buckets[0]),
    )
  logging.info(
    "%s: made with resample=%s, crop=%s, tile=%s, dtype=%s, %s text states",
    *(source.name, made.resample, made.crop, made.tile, made.dtype),
    "with" if manifest.has_text else "without",
  )
  opened = opening.open_cache(
    source,
    config.data,
    batch_size=config.batch_size,
    seed=config.seed,
    tokenize=None if manifest.has_text else tokenize,
  )
  frozen = {}
  if manifest.has_text:
    null_text = source.null_caption()[None]
    frozen = {
      "null_text": null_text,
      "null_text_mask": readers.null_mask(null_text.shape[1]),
    }
  return Inputs(
    opened.batches,
    frozen=frozen,
    condition=cached_conditions if frozen else latents_to_conditions,
    encodes_text=not manifest.has_text,
    num_shapes=len(opened.shapes),
    size_of=lambda batch: tuple(
      made.compression * side for side in batch["latents"].shape[1:3]
    ),
    name_batch=opened.name_batch,
    ledger=_ledger(opened, config),
  )


def check_cache(
  manifest: cache_manifest.Manifest,
  config: config_lib.TextToImageConfig,
  autoencoder_config: config_lib.DCAEConfig,
  generation: options.GenerationConfig,
) -> None:
  """Compares what a cache was made with, with what a run needs.

  Tile and dtype are no matter of need: a run takes them as they are, and does
  not go on with others.

  Raises:
    ValueError: it does not fit; names all that differs.
  """
  problems = _bucket_problems(manifest.settings, config)
  if manifest.has_text and config.train_text_encoder:
    problems.append(
      "it holds text states, which train_text_encoder=True would change: "
      "make one with --latents_only, or set it to False"
    )
  text = {
    "max_sequence_length": config.max_sequence_length,
    "text_width": config.model.caption_channels,
    "instruction_sha256": text_lib.instruction_sha256(
      generation.complex_human_instruction
    ),
    "tokenizer_sha256": text_lib.tokenizer_sha256(config.tokenizer),
    "lowercase": True,
  }
  if config.text_encoder_path is not None:
    text["text_encoder_sha256"] = files.weights_sha256(config.text_encoder_path)
  manifest.check(
    *problems,
    image_size=config.data.image_size,
    crop="center",
    resample=opening.resample_filter(config.data),
    scaling_factor=autoencoder_config.scaling_factor,
    compression=autoencoder_config.spatial_compression,
    latent_channels=config.model.in_channels,
    autoencoder_sha256=files.weights_sha256(config.autoencoder),
    **(text if manifest.has_text else {}),
  )


def _bucket_problems(
  settings: cache_manifest.Settings, config: config_lib.TextToImageConfig
) -> list[str]:
  problems = []
  multiple = settings.compression * config.model.patch_size
  if odd := [s for s in settings.buckets if any(x % multiple for x in s)]:
    problems.append(
      f"buckets has {odd}, training needs multiples of {multiple}, the pixels "
      "per token"
    )
  wanted = config.data.buckets
  if settings.image_size == config.data.image_size:
    known = {
      shape
      for kind in ("square", "aspect")
      if wanted in (None, kind)
      for shape in buckets.table(
        kind, settings.image_size, settings.compression
      ).values()
    }
    if strange := sorted(set(settings.buckets) - known):
      problems.append(
        f"buckets has {strange}, which are not in the tables of "
        f"{settings.image_size} pixels"
        + (f" for data.buckets={wanted!r}: set it to None" if wanted else "")
      )
  return problems


def _ledger(
  opened: opening.Opened, config: config_lib.TextToImageConfig
) -> ledger_lib.Ledger:
  return ledger_lib.Ledger(opened, allow_changed=config.data.allow_changed)


def from_synthetic(config: config_lib.TextToImageConfig) -> Inputs:
  """Draws noise in the shapes of a cache; no file is read.

  Raises:
    ValueError: pictures of data.image_size would have another latent grid.
  """
  side, grid = config.data.image_size, config.model.sample_size
  published = grid in resolution.SAMPLE_SIZES
  if side % grid or (published and side != grid * resolution.COMPRESSION):
    raise ValueError(
      f"data.image_size ({side}) does not fit model.sample_size ({grid}), the "
      "latent grid that data.synthetic has; at 32 pixels per latent it is "
      f"{grid * resolution.COMPRESSION}."
    )
  batch = abstract_batch(config, grid, grid)
  logging.info(
    "training on noise, so there will be neither samples nor an export: %s",
    ", ".join(f"{name} {leaf.shape}" for name, leaf in batch.items()),
  )
  noise = synthetic.open_noise(
    *(batch["latents"].shape[1:], batch["text"].shape[1:]),
    batch_size=config.batch_size,
    seed=config.seed,
  )
  null = abstract_frozen(config)["null_text"]
  return Inputs(
    noise,
    frozen={
      "null_text": np.zeros(null.shape, null.dtype),
      "null_text_mask": readers.null_mask(null.shape[1]),
    },
    condition=cached_conditions,
    encodes_text=False,
    num_shapes=1,
    size_of=lambda batch: (side, side),
  )


def abstract_batch(
  config: config_lib.TextToImageConfig, height: int, width: int
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of a global batch of `cached_conditions`.

  Args:
    height: of the latents, not of the pictures; so is `width`.
  """
  size, length = config.batch_size, config.max_sequence_length
  text = (size, length, config.model.caption_channels)
  latents = (size, height, width, config.model.in_channels)
  return {
    "latents": jax.ShapeDtypeStruct(latents, jnp.bfloat16),
    "text": jax.ShapeDtypeStruct(text, jnp.bfloat16),
    "text_mask": jax.ShapeDtypeStruct(text[:2], bool),
  }


def abstract_frozen(
  config: config_lib.TextToImageConfig,
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of what `cached_conditions` needs beside a batch."""
  text = (1, config.max_sequence_length, config.model.caption_channels)
  return {
    "null_text": jax.ShapeDtypeStruct(text, jnp.bfloat16),
    "null_text_mask": jax.ShapeDtypeStruct(text[:2], bool),
  }


def tokens_to_conditions(params, frozen, batch, config) -> Conditions:
  """Encodes the batch's tokens, and those of the empty caption."""
  encoder = params.get("text_encoder", frozen.get("text_encoder"))
  length = config.max_sequence_length
  text, mask = text_lib.encode_tokens(
    encoder,
    batch["input_ids"],
    batch["attention_mask"],
    max_sequence_length=length,
  )
  null_text, null_mask = text_lib.encode_tokens(
    encoder, frozen["null_ids"], frozen["null_mask"], max_sequence_length=length
  )
  return Conditions(batch["latents"], text, mask, null_text, null_mask)


def images_to_conditions(
  params, frozen, batch, config, *, scaling_factor: float
) -> Conditions:
  """Encodes the batch's pictures and tokens."""
  images = batch["images"].astype(jnp.float32) / 127.5 - 1
  latents = frozen["autoencoder"].encode(images).astype(jnp.float32)
  batch = batch | {"latents": latents * scaling_factor}
  return tokens_to_conditions(params, frozen, batch, config)


def latents_to_conditions(params, frozen, batch, config) -> Conditions:
  """Takes latents from the batch, and encodes its tokens."""
  latents = batch["latents"].astype(jnp.float32)
  return tokens_to_conditions(
    params, frozen, batch | {"latents": latents}, config
  )


def cached_conditions(params, frozen, batch, config) -> Conditions:
  """Takes everything from the batch."""
  del params, config
  return Conditions(
    batch["latents"].astype(jnp.float32),
    batch["text"],
    batch["text_mask"],
    frozen["null_text"],
    frozen["null_text_mask"],
  )


def encode_images(
  autoencoder: dc_ae.DCAE,
  config: config_lib.DataConfig,
  *,
  batch_size: int = 64,
) -> Float[np.ndarray, "n h w c"]:
  """Encodes every emoji of the split once; the latents stay in memory."""
  source = examples.load_source(config)
  encode = jax.jit(dc_ae.DCAE.encode)
  # The program is not written for a mesh.
  autoencoder = jax.device_put(autoencoder, jax.local_devices()[0])
  latents = []
  for start in range(0, len(source), batch_size):
    # The last batch is filled up, so that one shape is compiled.
    indices = [
      min(i, len(source) - 1) for i in range(start, start + batch_size)
    ]
    images = [examples.to_unit_range(source[i]["image"]) for i in indices]
    latents.append(
      np.asarray(encode(autoencoder, np.stack(images)), np.float32)
    )
  return np.concatenate(latents)[: len(source)]
