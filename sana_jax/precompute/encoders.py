"""The models that a cache is made with: pictures and captions to arrays."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, BFloat16, Float, UInt8

from sana_jax import config as config_lib
from sana_jax import notices, sharding, text
from sana_jax import pipeline as pipeline_lib
from sana_jax.data import cache_records
from sana_jax.models import dc_ae, gemma2
from sana_jax.models import tiling as tiling_lib
from sana_jax.pipeline import decoding, encodings, execution, files, stages
from sana_jax.weights import files as weight_files

# Above this side, pictures are encoded in tiles unless told otherwise.
_WHOLE = 1024
_TILE = 1024

_BFLOAT16 = cache_records.BFLOAT16


class CaptionStates(NamedTuple):
  """What a set of captions became.

  Attributes:
    states: by caption, without padding.
    truncated: how many had more tokens than are used.
  """

  states: dict[str, BFloat16[np.ndarray, "_ d"]]
  truncated: int


class TextEncoder(NamedTuple):
  """Gemma with its tokenizer, and how captions are put to it."""

  model: gemma2.Gemma2
  config: config_lib.Gemma2Config
  tokenizer: text.Tokenizer
  instruction: tuple[str, ...] | None
  max_sequence_length: int
  lowercase: bool


@dataclasses.dataclass(kw_only=True)
class Encoders:
  """Makes what a cache holds, in batches of one size on all devices.

  Args:
    text: None: latents only.
    tiling: encodes and decodes pictures in overlapping tiles; None: whole.
    identity: fields of `cache_manifest.Settings` that describe the models.
    checkpoint: its name, for people.
    progress: told of every stage.
  """

  autoencoder: dc_ae.DCAE
  autoencoder_config: config_lib.DCAEConfig
  text: TextEncoder | None
  tiling: tiling_lib.Tiling | None
  batch_size: int
  identity: dict[str, Any]
  checkpoint: str
  devices: Sequence[jax.Device] | None = None
  progress: Callable[[execution.Progress], None] | None = None

  def __post_init__(self):
    self._executor = execution.Executor(self.devices or jax.local_devices())
    self._prefixes: encodings.Prefixes = {}
    self.autoencoder = self._executor.place(self.autoencoder)
    if self.text is not None:
      self.text = self.text._replace(
        model=self._executor.place(self.text.model)
      )

  def encode_images(
    self, images: UInt8[np.ndarray, "b height width 3"]
  ) -> BFloat16[np.ndarray, "b h w c"]:
    """Returns latents in the transformer's scale; at most a batch."""
    latents = self._executor.run(
      "encoder",
      _encode_pixels,
      shared={"autoencoder": self.autoencoder},
      batched={"pixels": self._filled(images)},
      static={
        "scaling_factor": self.autoencoder_config.scaling_factor,
        "tiling": self.tiling,
      },
      progress=self.progress,
    )
    return np.asarray(latents)[: len(images)]

  def decode_latents(
    self, latents: BFloat16[np.ndarray, "b h w c"]
  ) -> Float[np.ndarray, "b height width 3"]:
    """Returns pictures in [0, 1]; at most a batch."""
    factor = self.autoencoder_config.spatial_compression
    images = decoding.decode(
      self._executor,
      self.autoencoder,
      self._filled(latents).astype(np.float32),
      how=decoding.Decoding(tiling=self.tiling),
      scaling_factor=self.autoencoder_config.scaling_factor,
      height=factor * latents.shape[1],
      width=factor * latents.shape[2],
      progress=self.progress,
    )
    return np.asarray(images)[: len(latents)]

  def encode_captions(self, captions: Sequence[str]) -> CaptionStates:
    """Encodes every distinct caption once, in the order they come.

    Raises:
      FloatingPointError: the states of a caption are not finite.
      ValueError: there is no text encoder.
    """
    distinct = list(dict.fromkeys(captions))
    states: dict[str, np.ndarray] = {}
    truncated = 0
    for start in range(0, len(distinct), self.batch_size):
      batch = distinct[start : start + self.batch_size]
      rows, masks, long = self._encode_batch(batch, self._text().instruction)
      truncated += long
      for caption, row, mask in zip(batch, rows, masks, strict=True):
        # A copy: a caption must not keep the whole batch alive.
        states[caption] = row[: mask.sum()].copy()
    return CaptionStates(states, truncated)

  def null_caption(self) -> BFloat16[np.ndarray, "l d"]:
    """Returns the states of the empty caption, those of the padding too."""
    # The instruction is never put before it.
    rows, _, _ = self._encode_batch([""], None)
    return rows[0]

  def _encode_batch(self, batch, instruction):
    """Returns states, masks, and how many captions lost their end."""
    encoder = self._text()
    dropped: list[str] = []
    with notices.heard_by(dropped.append):
      tokens = text.tokenize_prompts(
        encoder.tokenizer,
        batch,
        complex_human_instruction=instruction,
        max_sequence_length=encoder.max_sequence_length,
        lowercase=encoder.lowercase,
      )
    rows, masks = encodings.encode(
      self._executor,
      encoder.model,
      encodings.Tokens(
        *tokens, text.instruction_ids(encoder.tokenizer, instruction)
      ),
      self._prefixes,
      batch_size=self.batch_size,
      max_sequence_length=encoder.max_sequence_length,
      function=_encode_tokens,
      progress=self.progress,
    )
    for caption, row in zip(batch, rows, strict=True):
      if not np.isfinite(row.astype(np.float32)).all():
        raise FloatingPointError(
          f"The text encoder made no numbers of the caption {caption!r}; try "
          "--dtype=float32."
        )
    return rows, masks, len(dropped)

  def _text(self) -> TextEncoder:
    if self.text is None:
      raise ValueError(
        "These encoders were loaded without a text encoder, for latents only."
      )
    return self.text

  def _filled(self, rows: np.ndarray) -> np.ndarray:
    """Repeats the last row, so that one size of batch is compiled."""
    missing = self.batch_size - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])


def _encode_pixels(*, autoencoder, pixels, scaling_factor, tiling) -> Array:
  # A quarter of the bytes to move, compared with floats.
  return decoding.encode(
    autoencoder=autoencoder,
    images=pixels.astype(jnp.float32) / 255,
    scaling_factor=scaling_factor,
    how=decoding.Decoding(tiling=tiling),
  ).astype(jnp.bfloat16)


def _encode_tokens(**arguments):
  condition = stages.encode_text(**arguments)
  return condition._replace(states=condition.states.astype(jnp.bfloat16))


def load(
  checkpoint: epath.PathLike,
  *,
  dtype: str,
  variant: str | None = None,
  latents_only: bool = False,
  tile: int | None,
  batch_size: int,
) -> Encoders:
  """Loads the autoencoder and the text encoder of a checkpoint.

  Args:
    checkpoint: a directory in the layout of diffusers, or a published name.
    tile: side of the tiles in pixels; None: whole pictures.

  Raises:
    FileNotFoundError: something is missing.
    ValueError: something is unreadable, or does not fit.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
  devices = jax.local_devices()
  path, parts = files.load_encoders(
    checkpoint,
    dtype=dtype,
    variant=variant,
    mesh=sharding.make_mesh({"data": len(devices)}, devices),
    with_text=not latents_only,
  )
  config = parts["autoencoder_config"]
  tiling = None if tile is None else tiling_lib.square(tile)
  if tiling is not None:
    tiling.check_multiples(config.spatial_compression)
  text_encoder = None if latents_only else _text_encoder(parts)
  return Encoders(
    autoencoder=parts["autoencoder"],
    autoencoder_config=config,
    text=text_encoder,
    tiling=tiling,
    batch_size=batch_size,
    identity={
      "autoencoder_sha256": _sha256(path / "vae", variant),
      "scaling_factor": config.scaling_factor,
      "compression": config.spatial_compression,
      "latent_channels": config.latent_channels,
      "tile": tile,
      "dtype": dtype,
      "batch_size": batch_size,
      **_text_identity(path, variant, text_encoder),
    },
    checkpoint=path.absolute().name,
    devices=devices,
  )


def default_tile(image_size: int) -> int | None:
  """Returns the side of the tiles that pictures of this size are cut in."""
  return None if image_size <= _WHOLE else _TILE


def _text_encoder(parts: dict[str, Any]) -> TextEncoder:
  settings: pipeline_lib.GenerationConfig = parts["generation_config"]
  lines = settings.complex_human_instruction
  return TextEncoder(
    model=parts["text_encoder"],
    config=parts["text_encoder_config"],
    tokenizer=parts["tokenizer"],
    instruction=None if lines is None else tuple(lines),
    max_sequence_length=settings.max_sequence_length,
    lowercase=settings.lowercase,
  )


def _text_identity(
  path: epath.Path, variant: str | None, encoder: TextEncoder | None
) -> dict[str, Any]:
  if encoder is None:
    return dict.fromkeys(_TEXT_FIELDS)
  values = (
    _sha256(path / "text_encoder", variant),
    text.tokenizer_sha256(str(path / "tokenizer")),
    text.instruction_sha256(encoder.instruction),
    encoder.max_sequence_length,
    encoder.lowercase,
    encoder.config.hidden_size,
  )
  return dict(zip(_TEXT_FIELDS, values, strict=True))


_TEXT_FIELDS = (
  "text_encoder_sha256",
  "tokenizer_sha256",
  "instruction_sha256",
  "max_sequence_length",
  "lowercase",
  "text_width",
)


def _sha256(directory: epath.Path, variant: str | None) -> str:
  return weight_files.weights_sha256(
    directory, variant=files.variant_of(directory, variant)
  )
