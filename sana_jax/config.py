"""Typed configuration: a small base class, and the schema of everything.

A config is editable until `freeze()`; an unknown name is an error in both
phases. Files in `configs/` import this module only, so they load instantly.
Field names of the models are those of the published `config.json` files.
"""

import dataclasses
import json
import math
from typing import Any


class Config:
  """Base of all configs: typo-proof, freezable, convertible to a dict."""

  _frozen = False

  def __setattr__(self, name: str, value: Any) -> None:
    if self._frozen:
      raise AttributeError(
        f"{type(self).__name__}.{name} cannot be set: the config is frozen."
      )
    if name not in self.__dataclass_fields__:
      raise AttributeError(
        f"{type(self).__name__} has no field {name!r}; it has: "
        f"{', '.join(self.__dataclass_fields__)}."
      )
    object.__setattr__(self, name, value)

  def freeze(self) -> None:
    """Checks the values and forbids further changes, nested configs too."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, Config):
        value.freeze()
    self.validate()
    object.__setattr__(self, "_frozen", True)

  def validate(self) -> None:
    """Raises ValueError when values do not fit together."""

  def to_dict(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  def to_json(self) -> str:
    return json.dumps(self.to_dict(), indent=2)


def from_dict(cls: type, values: dict[str, Any], *, strict: bool = False):
  """Builds a config from a plain dict such as a parsed `config.json`.

  Args:
    strict: False ignores unknown keys and fills missing ones with defaults,
      as published files of several generations need; True raises on unknown
      keys.

  Raises:
    ValueError: an unknown key in strict mode.
  """
  known = {field.name for field in dataclasses.fields(cls)}
  unknown = sorted(set(values) - known)
  if strict and unknown:
    raise ValueError(f"{cls.__name__} has no fields {unknown}.")
  return cls(**{k: _tuples(v) for k, v in values.items() if k in known})


def _tuples(value: Any) -> Any:
  """Turns (nested) lists into tuples: configs compare and hash by value."""
  if isinstance(value, list | tuple):
    return tuple(_tuples(item) for item in value)
  return value


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ValueError(message)


@dataclasses.dataclass(kw_only=True)
class SanaBlocksConfig(Config):
  """What the transformer and its control branch have in common.

  Args:
    sample_size: side of the latent grid of a square image.
    interpolation_scale: None: no positional embedding.
  """

  in_channels: int = 32
  out_channels: int | None = 32
  num_attention_heads: int = 70
  attention_head_dim: int = 32
  num_layers: int = 20
  num_cross_attention_heads: int = 20
  cross_attention_head_dim: int = 112
  cross_attention_dim: int = 2240
  caption_channels: int = 2304
  mlp_ratio: float = 2.5
  attention_bias: bool = False
  sample_size: int = 32
  patch_size: int = 1
  norm_elementwise_affine: bool = False
  norm_eps: float = 1e-6
  interpolation_scale: float | None = None

  @property
  def width(self) -> int:
    return self.num_attention_heads * self.attention_head_dim

  def validate(self) -> None:
    cross = self.num_cross_attention_heads * self.cross_attention_head_dim
    _require(
      cross == self.width,
      f"model.num_cross_attention_heads * cross_attention_head_dim ({cross}) "
      f"must equal the width num_attention_heads * attention_head_dim "
      f"({self.width}).",
    )
    _require(
      self.cross_attention_dim == self.width,
      f"model.cross_attention_dim ({self.cross_attention_dim}) must equal the "
      f"width ({self.width}): captions are projected to it first.",
    )


@dataclasses.dataclass(kw_only=True)
class SanaConfig(SanaBlocksConfig):
  """The diffusion transformer; names as in `transformer/config.json`.

  Args:
    qk_norm: None or "rms_norm_across_heads".
    guidance_embeds: True for Sprint: guidance is an input of the network.
    timestep_scale: multiplies the scheduler's timestep before the network.
  """

  qk_norm: str | None = None
  guidance_embeds: bool = False
  guidance_embeds_scale: float = 0.1
  timestep_scale: float = 1.0

  def validate(self) -> None:
    super().validate()
    _require(
      self.qk_norm in (None, "rms_norm_across_heads"),
      f"model.qk_norm must be None or 'rms_norm_across_heads', "
      f"got {self.qk_norm!r}.",
    )


@dataclasses.dataclass(kw_only=True)
class SanaControlNetConfig(SanaBlocksConfig):
  """The control branch; names as in `controlnet/config.json`."""

  num_layers: int = 7


def sana_600m() -> SanaConfig:
  """SANA 0.6B (1024 px; sample_size 16 for 512 px)."""
  return SanaConfig(
    num_attention_heads=36,
    num_layers=28,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
  )


def sana_1600m() -> SanaConfig:
  """SANA 1.6B (1024 px; sample_size 16 for 512 px)."""
  return SanaConfig()


def sana_1600m_2k() -> SanaConfig:
  """SANA 1.6B at 2048 px, with positional embedding."""
  return SanaConfig(sample_size=64, interpolation_scale=1.0)


def sana_1600m_4k() -> SanaConfig:
  """SANA 1.6B at 4096 px, with positional embedding."""
  return SanaConfig(sample_size=128, interpolation_scale=2.0)


def sana15_1600m() -> SanaConfig:
  """SANA-1.5 1.6B: query/key norms in both attentions."""
  return SanaConfig(qk_norm="rms_norm_across_heads")


def sana15_4800m() -> SanaConfig:
  """SANA-1.5 4.8B."""
  return SanaConfig(num_layers=60, qk_norm="rms_norm_across_heads")


def sana_sprint_600m() -> SanaConfig:
  """SANA-Sprint 0.6B."""
  config = sana_600m()
  config.qk_norm = "rms_norm_across_heads"
  config.guidance_embeds = True
  return config


def sana_sprint_1600m() -> SanaConfig:
  """SANA-Sprint 1.6B."""
  return SanaConfig(qk_norm="rms_norm_across_heads", guidance_embeds=True)


_SANA_STAGES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
_NO_SCALES = ((),) * 3
_FIVE = ((5,),) * 3


@dataclasses.dataclass(kw_only=True)
class DCAEConfig(Config):
  """The deep-compression autoencoder; names as in `vae/config.json`.

  A stage with zero layers is skipped: the neighbouring convolution resamples.
  The defaults are DC-AE f32c32 (sana-1.0 and sana-1.1).
  """

  in_channels: int = 3
  latent_channels: int = 32
  attention_head_dim: int = 32
  encoder_block_types: str | tuple[str, ...] = _SANA_STAGES
  decoder_block_types: str | tuple[str, ...] = _SANA_STAGES
  encoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
  decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
  encoder_layers_per_block: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
  decoder_layers_per_block: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
  encoder_qkv_multiscales: tuple[tuple[int, ...], ...] = _NO_SCALES + _FIVE
  decoder_qkv_multiscales: tuple[tuple[int, ...], ...] = _NO_SCALES + _FIVE
  downsample_block_type: str = "conv"
  upsample_block_type: str = "interpolate"
  decoder_norm_types: str | tuple[str, ...] = "rms_norm"
  decoder_act_fns: str | tuple[str, ...] = "silu"
  encoder_out_shortcut: bool = True
  decoder_in_shortcut: bool = True
  decoder_conv_act_fn: str = "relu"
  scaling_factor: float = 0.41407

  @property
  def spatial_compression(self) -> int:
    return 2 ** (len(self.encoder_block_out_channels) - 1)


def dc_ae_lite() -> DCAEConfig:
  """DC-AE-Lite: the same encoder, a faster all-ResBlock decoder."""
  return DCAEConfig(
    decoder_block_types="ResBlock",
    decoder_layers_per_block=(0, 3, 5, 4, 4, 4),
    decoder_qkv_multiscales=((),) * 6,
    upsample_block_type="pixel_shuffle",
    decoder_conv_act_fn="silu",
  )


@dataclasses.dataclass(kw_only=True)
class Gemma2Config(Config):
  """The text encoder; names as in `text_encoder/config.json`.

  Args:
    layer_types: "sliding_attention" or "full_attention" per layer; None
      alternates, starting with sliding.
  """

  vocab_size: int = 256_000
  hidden_size: int = 2304
  intermediate_size: int = 9216
  num_hidden_layers: int = 26
  num_attention_heads: int = 8
  num_key_value_heads: int = 4
  head_dim: int = 256
  rms_norm_eps: float = 1e-6
  rope_theta: float = 10_000.0
  sliding_window: int = 4096
  query_pre_attn_scalar: float = 256
  attn_logit_softcapping: float | None = 50.0
  final_logit_softcapping: float | None = 30.0
  layer_types: tuple[str, ...] | None = None
  pad_token_id: int = 0
  eos_token_id: int = 1
  bos_token_id: int = 2

  def validate(self) -> None:
    _require(
      self.num_attention_heads % self.num_key_value_heads == 0,
      f"text_encoder.num_attention_heads ({self.num_attention_heads}) must be "
      f"a multiple of num_key_value_heads ({self.num_key_value_heads}).",
    )


@dataclasses.dataclass(kw_only=True)
class FlowConfig(Config):
  """Rectified flow: how noise levels are drawn in training.

  Args:
    shift: moves noise levels towards noise; 3 at 1024 pixels.
    logit_mean: mean of the normal whose sigmoid is the raw time.
    logit_std: its standard deviation.
    caption_dropout: share of samples trained with the null caption.
    null_mask: which text mask goes with a dropped caption: "caption" keeps the
      caption's (how SANA was trained), "own" takes the null caption's (what
      diffusers and `SanaPipeline` sample with).
  """

  shift: float = 3.0
  logit_mean: float = 0.0
  logit_std: float = 1.0
  caption_dropout: float = 0.1
  null_mask: str = "caption"

  def validate(self) -> None:
    _require(self.shift > 0, f"flow.shift must be > 0, got {self.shift}.")
    _require(
      0 <= self.caption_dropout <= 1,
      f"flow.caption_dropout must be in [0, 1], got {self.caption_dropout}.",
    )
    _require(
      self.null_mask in ("caption", "own"),
      f"flow.null_mask must be 'caption' or 'own', got {self.null_mask!r}.",
    )


@dataclasses.dataclass(kw_only=True)
class OptimConfig(Config):
  """AdamW with linear warm-up, a schedule, and global-norm clipping.

  Args:
    schedule: after warm-up: "constant", or "cosine" down to `final_lr_ratio`
      of the peak at the last step.
  """

  peak_lr: float = 1e-4
  warmup_steps: int = 2000
  schedule: str = "constant"
  final_lr_ratio: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.01
  clip_norm: float = 0.1

  def validate(self) -> None:
    _require(
      self.schedule in ("constant", "cosine"),
      f"optim.schedule must be 'constant' or 'cosine', got {self.schedule!r}.",
    )
    for name in ("peak_lr", "clip_norm", "eps"):
      value = getattr(self, name)
      _require(
        value > 0 and math.isfinite(value),
        f"optim.{name} must be a positive number, got {value}.",
      )
    for name in ("warmup_steps", "weight_decay"):
      value = getattr(self, name)
      _require(value >= 0, f"optim.{name} must not be negative, got {value}.")
    for name in ("b1", "b2"):
      value = getattr(self, name)
      _require(0 <= value < 1, f"optim.{name} must be in [0, 1), got {value}.")
    _require(
      0 <= self.final_lr_ratio <= 1,
      f"optim.final_lr_ratio must be in [0, 1], got {self.final_lr_ratio}.",
    )


@dataclasses.dataclass(kw_only=True)
class DataConfig(Config):
  """Captioned images, read by Grain from a TFDS ArrayRecord directory.

  Args:
    data_dir: the TFDS version directory; None: the bundled emoji.
    split: "train" or "heldout".
    image_size: side in pixels; records of another size are an error.
    keyword_probability: share of captions that get keywords appended.
    keywords_only_probability: share of captions made of keywords alone.
  """

  data_dir: str | None = None
  split: str = "train"
  image_size: int = 64
  keyword_probability: float = 0.0
  keywords_only_probability: float = 0.0
  num_threads: int = 4


@dataclasses.dataclass(kw_only=True)
class TrainConfig(Config):
  """What every training run has, whatever it trains.

  Args:
    ema_decay: of the averaged parameters that are sampled and exported.
    mesh: sizes of the axes "data" (copies) and "fsdp" (shards of parameters);
      one -1 takes the devices that are left.
    checkpoints_to_keep: older checkpoints are deleted.
    dtype: compute dtype; parameters and optimiser state stay float32.
    remat: "none", "full" or "dots" (see nn/stack.py).
    scan_layers: False unrolls the blocks: faster on CPU, slower to compile.
  """

  seed: int = 0
  num_steps: int = 1000
  batch_size: int = 64
  optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  ema_decay: float = 0.9999
  log_every: int = 20
  checkpoint_every: int = 500
  checkpoints_to_keep: int = 2
  sample_every: int = 500
  mesh: dict[str, int] = dataclasses.field(
    default_factory=lambda: {"data": -1, "fsdp": 1}
  )
  dtype: str = "bfloat16"
  remat: str = "full"
  scan_layers: bool = True

  def validate(self) -> None:
    for name in (
      *("num_steps", "batch_size", "log_every", "sample_every"),
      *("checkpoint_every", "checkpoints_to_keep"),
    ):
      value = getattr(self, name)
      _require(value > 0, f"{name} must be positive, got {value}.")
    _require(
      set(self.mesh) == {"data", "fsdp"},
      f"mesh must have the axes 'data' and 'fsdp', got {self.mesh}.",
    )
    _require(
      self.remat in ("none", "full", "dots"),
      f"remat must be 'none', 'full' or 'dots', got {self.remat!r}.",
    )
    _require(
      self.dtype in ("float32", "bfloat16"),
      f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}.",
    )
    _require(
      0 <= self.ema_decay < 1,
      f"ema_decay must be in [0, 1), got {self.ema_decay}.",
    )


@dataclasses.dataclass(kw_only=True)
class TextToImageConfig(TrainConfig):
  """Trains a SanaTransformer on the latents of a fixed autoencoder.

  Args:
    autoencoder: directory of the autoencoder, diffusers layout (`vae/`).
    tokenizer: directory of the tokenizer.
    text_encoder: architecture of the text encoder.
    text_encoder_path: pretrained weights; None: random initialisation.
    train_text_encoder: True trains it together with the transformer.
    max_sequence_length: caption tokens, beginning-of-sequence included.
    use_complex_human_instruction: True puts SANA's instruction before every
      caption.
    sample_prompts: prompts of the sample grids made while training.
  """

  model: SanaConfig = dataclasses.field(default_factory=SanaConfig)
  text_encoder: Gemma2Config = dataclasses.field(default_factory=Gemma2Config)
  text_encoder_path: str | None = None
  train_text_encoder: bool = False
  autoencoder: str = ""
  tokenizer: str = ""
  max_sequence_length: int = 300
  use_complex_human_instruction: bool = False
  flow: FlowConfig = dataclasses.field(default_factory=FlowConfig)
  sample_prompts: tuple[str, ...] = ()
  sample_steps: int = 20
  sample_guidance_scale: float = 4.5

  def validate(self) -> None:
    super().validate()
    _require(
      self.model.caption_channels == self.text_encoder.hidden_size,
      f"model.caption_channels ({self.model.caption_channels}) must equal "
      f"text_encoder.hidden_size ({self.text_encoder.hidden_size}).",
    )
    _require(
      self.train_text_encoder or self.text_encoder_path is not None,
      "text_encoder_path is None: give the pretrained text encoder's "
      "directory, or set train_text_encoder=True.",
    )
    for name in ("autoencoder", "tokenizer", "sample_prompts"):
      _require(bool(getattr(self, name)), f"{name} is empty: set it.")


@dataclasses.dataclass(kw_only=True)
class AutoencoderConfig(TrainConfig):
  """Trains a DCAE to reconstruct images.

  Loss: l1 + l2_weight * l2 + latent_penalty * mean(z^2), decoded from
  z + latent_noise * noise.

  Args:
    latent_noise: noise added to latents before decoding, so that the decoder
      forgives the small errors of a sampled latent.
    latent_penalty: keeps latents from growing to drown that noise.
  """

  model: DCAEConfig = dataclasses.field(default_factory=DCAEConfig)
  l2_weight: float = 1.0
  latent_noise: float = 0.0
  latent_penalty: float = 0.0
