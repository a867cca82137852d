"""What is measured: models, pictures, batches, and the inputs of both sides."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from sana_jax import config as config_lib
from sana_jax import flops

# Operations of DC-AE f32c32 for a pixel: what PyTorch's counter says of the
# published modules at 1024 pixels. Both are linear in the pixels.
_AUTOENCODER_FLOPS = {"encode": 5.180e12 / 2**20, "decode": 8.369e12 / 2**20}
_COMPRESSION = 32
TEXT_LENGTH = 300
GUIDANCE = 4.5
# About 200 tokens of the tokenizer that both sides have here, which is what
# the published instruction is in Gemma's.
INSTRUCTION = (
  "Describe the picture in detail: colours, shapes, sizes and their places. ",
  "Keep to what is asked for, and add what makes it vivid. Prompt: ",
) * 3


class Checkpoint(NamedTuple):
  """A pipeline of random weights, by its configs."""

  transformer: config_lib.SanaConfig
  autoencoder: config_lib.DCAEConfig
  text_encoder: config_lib.Gemma2Config

  @property
  def is_sprint(self) -> bool:
    return self.transformer.guidance_embeds


class Workload(NamedTuple):
  """One thing to time.

  Attributes:
    kind: "text", "transformer", "sampler", "decode", "encode", "pipeline".
    checkpoint: its name among the size's.
    batch: of the call: pictures, guided ones counting once; for "transformer"
      evaluations; for "text" prompts.
    goal: ratio to PyTorch that is hoped for.
    seconds: that are hoped for on an H200; None: none in particular.
  """

  kind: str
  checkpoint: str
  pixels: int
  batch: int = 1
  steps: int = 20
  tolerance: float = 1e-5
  goal: float | None = None
  seconds: float | None = None


class Size(NamedTuple):
  """Workloads by name, and the checkpoints they need."""

  checkpoints: Mapping[str, Callable[[], Checkpoint]]
  workloads: Mapping[str, Workload]


def work(checkpoint: Checkpoint, workload: Workload) -> float | None:
  """Counts the operations of one call; None: of an autoencoder not counted."""
  kind, batch = workload.kind, workload.batch
  published = checkpoint.autoencoder == config_lib.DCAEConfig()
  if not published and kind in ("encode", "decode", "pipeline"):
    return None
  pixels = workload.pixels**2
  if kind in _AUTOENCODER_FLOPS:
    return batch * pixels * _AUTOENCODER_FLOPS[kind]
  if kind == "text":
    return batch * _text_flops(checkpoint.text_encoder, TEXT_TOKENS)
  step = batch * flops.forward(
    checkpoint.transformer,
    workload.pixels,
    workload.pixels,
    text_length=TEXT_LENGTH,
  )
  if kind == "transformer":
    return step
  branches = 1 if checkpoint.is_sprint else 2
  sampler = workload.steps * branches * step
  if kind == "sampler":
    return sampler
  return (
    sampler
    + batch * pixels * _AUTOENCODER_FLOPS["decode"]
    + batch * _text_flops(checkpoint.text_encoder, TEXT_TOKENS)
  )


# The instruction and a caption of full length.
TEXT_TOKENS = 510


def _text_flops(config: config_lib.Gemma2Config, tokens: int) -> float:
  width, heads = config.hidden_size, config.num_attention_heads
  projections = 2 * config.head_dim * (heads + config.num_key_value_heads)
  layer = width * (projections + 3 * config.intermediate_size)
  attention = 2 * tokens * heads * config.head_dim
  return 2.0 * tokens * config.num_hidden_layers * (layer + attention)


class Inputs(NamedTuple):
  """Arrays that both sides are given; channels last."""

  latents: np.ndarray
  timestep: np.ndarray
  text: np.ndarray
  null_text: np.ndarray
  mask: np.ndarray
  images: np.ndarray
  input_ids: np.ndarray
  ids_mask: np.ndarray


def inputs(checkpoint: Checkpoint, workload: Workload, seed: int = 0) -> Inputs:
  """Draws them: float32, texts of several lengths."""
  rng = np.random.default_rng(seed)
  batch = workload.batch
  side = workload.pixels // _compression(checkpoint)
  config = checkpoint.transformer

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  lengths = rng.integers(20, TEXT_LENGTH + 1, size=batch)
  tokens = rng.integers(TEXT_TOKENS // 2, TEXT_TOKENS + 1, size=batch)
  vocabulary = checkpoint.text_encoder.vocab_size
  return Inputs(
    latents=normal(batch, side, side, config.in_channels),
    timestep=rng.uniform(50, 950, size=batch).astype(np.float32),
    text=normal(batch, TEXT_LENGTH, config.caption_channels),
    null_text=normal(batch, TEXT_LENGTH, config.caption_channels),
    mask=np.arange(TEXT_LENGTH) < lengths[:, None],
    images=rng.uniform(
      -1, 1, (batch, workload.pixels, workload.pixels, 3)
    ).astype(np.float32),
    input_ids=rng.integers(3, vocabulary, size=(batch, TEXT_TOKENS)),
    ids_mask=(np.arange(TEXT_TOKENS) < tokens[:, None]).astype(np.int32),
  )


def _compression(checkpoint: Checkpoint) -> int:
  return checkpoint.autoencoder.spatial_compression


def _with(config, **changes):
  return dataclasses.replace(config, **changes)


# Of the bundled tokenizer, with which all of them are written.
_VOCABULARY = 2048


def _small_text_encoder() -> config_lib.Gemma2Config:
  """Two layers of the published width."""
  return config_lib.Gemma2Config(vocab_size=_VOCABULARY, num_hidden_layers=2)


def _small_600m() -> Checkpoint:
  return Checkpoint(
    _with(config_lib.sana_600m(), num_layers=4, sample_size=16),
    config_lib.DCAEConfig(),
    _small_text_encoder(),
  )


def _small_1600m() -> Checkpoint:
  return Checkpoint(
    _with(config_lib.sana_1600m(), num_layers=1),
    config_lib.DCAEConfig(),
    _small_text_encoder(),
  )


def _full(transformer: config_lib.SanaConfig) -> Checkpoint:
  return Checkpoint(
    transformer, config_lib.DCAEConfig(), config_lib.Gemma2Config()
  )


def _tiny(**changes) -> Checkpoint:
  transformer = config_lib.SanaConfig(
    in_channels=4,
    out_channels=4,
    num_attention_heads=2,
    attention_head_dim=8,
    num_layers=2,
    num_cross_attention_heads=2,
    cross_attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=12,
    sample_size=8,
    **changes,
  )
  kinds, widths = ("ResBlock", "EfficientViTBlock"), (8, 8)
  autoencoder = config_lib.DCAEConfig(
    latent_channels=4,
    attention_head_dim=4,
    encoder_block_types=kinds,
    decoder_block_types=kinds,
    encoder_block_out_channels=widths,
    decoder_block_out_channels=widths,
    encoder_layers_per_block=(1, 1),
    decoder_layers_per_block=(1, 1),
    encoder_qkv_multiscales=((), (5,)),
    decoder_qkv_multiscales=((), (5,)),
  )
  text_encoder = config_lib.Gemma2Config(
    vocab_size=_VOCABULARY,
    hidden_size=12,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    query_pre_attn_scalar=8,
  )
  return Checkpoint(transformer, autoencoder, text_encoder)


_STEP, _CODER, _IMAGE = 2e-2, 3e-2, 2e-1  # bfloat16, after few or many layers
SIZES: Mapping[str, Size] = {
  "small": Size(
    {"0.6B, 4 blocks": _small_600m, "1.6B, 1 block": _small_1600m},
    {
      "text": Workload("text", "0.6B, 4 blocks", 256),
      "transformer_600m_512": Workload(
        "transformer", "0.6B, 4 blocks", 512, 2, goal=1.15
      ),
      "transformer_1600m_1024": Workload(
        "transformer", "1.6B, 1 block", 1024, 2, goal=1.15
      ),
      "sampler_600m_256": Workload(
        "sampler", "0.6B, 4 blocks", 256, tolerance=1e-4, goal=1.0
      ),
      "decode_128": Workload(
        "decode", "0.6B, 4 blocks", 128, tolerance=2e-5, goal=1.15
      ),
      "decode_256": Workload(
        "decode", "0.6B, 4 blocks", 256, tolerance=2e-5, goal=1.15
      ),
      "encode_256": Workload(
        "encode", "0.6B, 4 blocks", 256, tolerance=2e-5, goal=1.15
      ),
      "pipeline_600m_256": Workload(
        "pipeline", "0.6B, 4 blocks", 256, tolerance=1e-4, goal=1.0
      ),
    },
  ),
  "full": Size(
    {
      "1.6B": lambda: _full(config_lib.sana_1600m()),
      "Sprint 1.6B": lambda: _full(config_lib.sana_sprint_1600m()),
      "1.6B 4K": lambda: _full(config_lib.sana_1600m_4k()),
    },
    {
      "text": Workload("text", "1.6B", 1024, tolerance=_CODER),
      "transformer_1024": Workload(
        "transformer", "1.6B", 1024, 2, tolerance=_STEP
      ),
      "decode_1024": Workload("decode", "1.6B", 1024, tolerance=_CODER),
      "encode_1024": Workload("encode", "1.6B", 1024, tolerance=_CODER),
      "sampler_1024": Workload("sampler", "1.6B", 1024, tolerance=_IMAGE),
      "pipeline_1024": Workload(
        *("pipeline", "1.6B", 1024), tolerance=_IMAGE, goal=0.6, seconds=0.37
      ),
      "pipeline_1024_batch_16": Workload(
        *("pipeline", "1.6B", 1024, 16), tolerance=_IMAGE, seconds=16 / 3
      ),
      "sprint_1024": Workload(
        *("pipeline", "Sprint 1.6B", 1024, 1, 2),
        tolerance=_IMAGE,
        seconds=0.060,
      ),
      "pipeline_4096": Workload(
        "pipeline", "1.6B 4K", 4096, tolerance=_IMAGE, seconds=5.6
      ),
    },
  ),
  "tiny": Size(
    {"tiny": _tiny},
    {
      "text": Workload("text", "tiny", 32, 2),
      "transformer": Workload("transformer", "tiny", 32, 2),
      "sampler": Workload("sampler", "tiny", 32, 1, 3, tolerance=1e-4),
      "decode": Workload("decode", "tiny", 32, tolerance=2e-5),
      "encode": Workload("encode", "tiny", 32, tolerance=2e-5),
      "pipeline": Workload("pipeline", "tiny", 32, 1, 3, tolerance=1e-4),
    },
  ),
}


def prompts(batch: int) -> Iterator[list[str]]:
  """Yields prompts for call after call, no two alike."""
  for call in itertools.count():
    yield [f"a red apple and {call} pears, {i}" for i in range(batch)]
