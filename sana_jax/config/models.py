"""Architectures, with the field names of published `config.json` files."""

import dataclasses

from sana_jax.config.base import Config, require


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
    require(
      cross == self.width,
      f"model.num_cross_attention_heads * cross_attention_head_dim ({cross}) "
      f"must equal the width num_attention_heads * attention_head_dim "
      f"({self.width}).",
    )
    require(
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
    require(
      self.qk_norm in (None, "rms_norm_across_heads"),
      f"model.qk_norm must be None or 'rms_norm_across_heads', "
      f"got {self.qk_norm!r}.",
    )


@dataclasses.dataclass(kw_only=True)
class SanaControlNetConfig(SanaBlocksConfig):
  """The control branch; names as in `controlnet/config.json`."""

  num_layers: int = 7


def sana_controlnet_600m() -> SanaControlNetConfig:
  """The control branch of SANA 0.6B."""
  return SanaControlNetConfig(
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
  )


def sana_controlnet_1600m() -> SanaControlNetConfig:
  """The control branch of SANA 1.6B."""
  return SanaControlNetConfig()


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
    require(
      self.num_attention_heads % self.num_key_value_heads == 0,
      f"text_encoder.num_attention_heads ({self.num_attention_heads}) must be "
      f"a multiple of num_key_value_heads ({self.num_key_value_heads}).",
    )
