"""DC-AE, the deep-compression autoencoder: 32x fewer pixels per side.

A pyramid of stages, residual convolutions at high resolution and linear
attention at low; every change of resolution has a parameter-free shortcut.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from sana_jax import config as config_lib
from sana_jax.nn import efficientvit, layers, stack, vision

_BLOCKS = ("ResBlock", "EfficientViTBlock")


class StageSpec(NamedTuple):
  """One resolution of the encoder or the decoder.

  Args:
    block: "ResBlock" or "EfficientViTBlock".
    scales: kernel sides of the attention's multi-scale branches.
    norm: "rms_norm" or "batch_norm".
  """

  width: int
  depth: int
  block: str
  scales: tuple[int, ...] = ()
  norm: str = "rms_norm"
  activation: str = "silu"


def encoder_stages(config: config_lib.DCAEConfig) -> tuple[StageSpec, ...]:
  """Lists the encoder's stages, from full resolution down."""
  count = len(config.encoder_block_out_channels)
  columns = {
    "encoder_block_out_channels": config.encoder_block_out_channels,
    "encoder_layers_per_block": config.encoder_layers_per_block,
    "encoder_block_types": _per_stage(config.encoder_block_types, count),
    "encoder_qkv_multiscales": config.encoder_qkv_multiscales,
  }
  return _stages(columns, count)


def decoder_stages(config: config_lib.DCAEConfig) -> tuple[StageSpec, ...]:
  """Lists the decoder's stages, from full resolution down; run in reverse."""
  count = len(config.decoder_block_out_channels)
  columns = {
    "decoder_block_out_channels": config.decoder_block_out_channels,
    "decoder_layers_per_block": config.decoder_layers_per_block,
    "decoder_block_types": _per_stage(config.decoder_block_types, count),
    "decoder_qkv_multiscales": config.decoder_qkv_multiscales,
    "decoder_norm_types": _per_stage(config.decoder_norm_types, count),
    "decoder_act_fns": _per_stage(config.decoder_act_fns, count),
  }
  return _stages(columns, count)


def _per_stage(value: str | tuple[str, ...], count: int) -> tuple[str, ...]:
  return (value,) * count if isinstance(value, str) else value


def _stages(columns: dict[str, Sequence], count: int) -> tuple[StageSpec, ...]:
  for name, column in columns.items():
    if len(column) != count:
      raise ValueError(
        f"{name} has {len(column)} entries for {count} stages: {column}."
      )
  stages = tuple(StageSpec(*row) for row in zip(*columns.values(), strict=True))
  for stage in stages:
    for kind, value, known in (
      ("block type", stage.block, _BLOCKS),
      ("norm type", stage.norm, efficientvit.NORMS),
      ("activation", stage.activation, tuple(efficientvit.ACTIVATIONS)),
    ):
      if value not in known:
        raise ValueError(f"{kind} must be one of {known}, got {value!r}.")
  return stages


class EncoderStage(nnx.Module):
  """Blocks, then a step down unless `down` is None."""

  def __init__(self, blocks: list[nnx.Module], down: vision.Downsample | None):
    self.blocks = nnx.List(blocks)
    self.down = down

  def __call__(
    self, x: Float[Array, "b h w c"], *, remat: str
  ) -> Float[Array, "b h2 w2 d"]:
    x = _run_blocks(self.blocks, x, remat)
    return x if self.down is None else self.down(x)


class DecoderStage(nnx.Module):
  """A step up unless `up` is None, then blocks."""

  def __init__(self, blocks: list[nnx.Module], up: vision.Upsample | None):
    self.blocks = nnx.List(blocks)
    self.up = up

  def __call__(
    self, x: Float[Array, "b h w c"], *, remat: str
  ) -> Float[Array, "b h2 w2 d"]:
    x = x if self.up is None else self.up(x)
    return _run_blocks(self.blocks, x, remat)


class Encoder(nnx.Module):
  """Images to latents.

  An empty stage neither transforms nor resamples; when it is the first,
  `conv_in` goes down in its place.

  Args:
    out_shortcut: adds the channel averages of the last features to the output.
  """

  def __init__(
    self,
    stages: Sequence[StageSpec],
    *,
    in_channels: int,
    latent_channels: int,
    head_dim: int,
    downsample: str,
    out_shortcut: bool,
    remat: str,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.remat = remat
    self.latent_channels = latent_channels
    self.out_shortcut = out_shortcut
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.conv_in = (
      layers.Conv(in_channels, stages[0].width, **common)
      if stages[0].depth
      else vision.Downsample(
        in_channels,
        stages[1].width,
        method=downsample,
        shortcut=False,
        **common,
      )
    )

    def down(i: int) -> vision.Downsample | None:
      if not stages[i].depth or i + 1 == len(stages):
        return None
      widths = stages[i].width, stages[i + 1].width
      return vision.Downsample(*widths, method=downsample, **common)

    self.stages = nnx.List(
      [
        EncoderStage(_blocks(stage, head_dim, **common), down(i))
        for i, stage in enumerate(stages)
      ]
    )
    width = stages[-1].width
    _check_shortcut(
      out_shortcut, "encoder_out_shortcut", width, latent_channels
    )
    self.conv_out = layers.Conv(width, latent_channels, **common)

  def __call__(self, images: Float[Array, "b h w c"]) -> Array:
    x = self.conv_in(images)
    for stage in self.stages:
      x = stage(x, remat=self.remat)
    y = self.conv_out(x)
    if self.out_shortcut:
      y = y + vision.average_channels(x, self.latent_channels)
    return y


class Decoder(nnx.Module):
  """Latents to images.

  An empty stage neither resamples nor transforms; when it is the first,
  `conv_out` goes up in its place.

  Args:
    in_shortcut: adds the repeated latent channels to the first features.
    out_activation: before the last convolution.

  Attributes:
    specs: the stages, as `upsample` for who cuts images.
  """

  def __init__(
    self,
    stages: Sequence[StageSpec],
    *,
    out_channels: int,
    latent_channels: int,
    head_dim: int,
    upsample: str,
    in_shortcut: bool,
    out_activation: str,
    remat: str,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.specs = tuple(stages)
    self.upsample = upsample
    self.remat = remat
    self.in_shortcut = in_shortcut
    self.width = stages[-1].width
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    _check_shortcut(
      in_shortcut, "decoder_in_shortcut", self.width, latent_channels
    )
    self.conv_in = layers.Conv(latent_channels, self.width, **common)

    def up(i: int) -> vision.Upsample | None:
      if not stages[i].depth or i + 1 == len(stages):
        return None
      widths = stages[i + 1].width, stages[i].width
      return vision.Upsample(*widths, method=upsample, **common)

    self.stages = nnx.List(
      [
        DecoderStage(_blocks(stage, head_dim, **common), up(i))
        for i, stage in enumerate(stages)
      ]
    )
    width = stages[0 if stages[0].depth else 1].width
    self.norm_out = efficientvit.make_norm("rms_norm", width, param_dtype)
    self.out_activation = efficientvit.ACTIVATIONS[out_activation]
    self.conv_out = (
      layers.Conv(width, out_channels, **common)
      if stages[0].depth
      else vision.Upsample(
        width, out_channels, method=upsample, shortcut=False, **common
      )
    )

  def __call__(self, latents: Float[Array, "b h w c"]) -> Array:
    return self.finish(self.begin(latents), self.stages)

  def begin(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    """Makes the features that the innermost stage starts from."""
    x = self.conv_in(latents)
    if self.in_shortcut:
      x = x + vision.repeat_channels(latents.astype(x.dtype), self.width)
    return x

  def finish(
    self, x: Float[Array, "b h w c"], stages: Sequence[DecoderStage]
  ) -> Array:
    """Makes images of features, by the outermost `stages`."""
    for stage in reversed(stages):
      x = stage(x, remat=self.remat)
    return self.conv_out(self.out_activation(self.norm_out(x)))


class DCAE(nnx.Module):
  """The autoencoder: deterministic, convolutional, for any multiple of 32.

  Images are in [-1, 1]. Latents are raw: the diffusion model works on
  `scaling_factor * latents`, and whoever joins the two applies the factor.

  Args:
    spatial_compression: pixels per latent, along each side.

  Source: Chen et al., DC-AE, arXiv:2410.10733; SANA, arXiv:2410.10629,
  section 2.1.
  """

  def __init__(
    self,
    encoder: Encoder,
    decoder: Decoder,
    *,
    spatial_compression: int,
    scaling_factor: float,
  ):
    self.encoder = encoder
    self.decoder = decoder
    self.spatial_compression = spatial_compression
    self.scaling_factor = scaling_factor

  @classmethod
  def from_config(
    cls,
    config: config_lib.DCAEConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    remat: str = "none",
    rngs: nnx.Rngs,
  ) -> "DCAE":
    """Checks the config and builds the model with fresh parameters.

    Args:
      remat: what the backward pass keeps of each block; see
        `stack.checkpointed`.

    Raises:
      ValueError: an unknown option, or widths that do not fit together.
    """
    config.validate()
    known = tuple(efficientvit.ACTIVATIONS)
    if config.decoder_conv_act_fn not in known:
      raise ValueError(
        f"decoder_conv_act_fn must be one of {known}, "
        f"got {config.decoder_conv_act_fn!r}."
      )
    common = {
      "latent_channels": config.latent_channels,
      "head_dim": config.attention_head_dim,
      "remat": remat,
      "dtype": dtype,
      "param_dtype": param_dtype,
      "rngs": rngs,
    }
    encoder = Encoder(
      encoder_stages(config),
      in_channels=config.in_channels,
      downsample=config.downsample_block_type,
      out_shortcut=config.encoder_out_shortcut,
      **common,
    )
    decoder = Decoder(
      decoder_stages(config),
      out_channels=config.in_channels,
      upsample=config.upsample_block_type,
      in_shortcut=config.decoder_in_shortcut,
      out_activation=config.decoder_conv_act_fn,
      **common,
    )
    return cls(
      encoder,
      decoder,
      spatial_compression=config.spatial_compression,
      scaling_factor=config.scaling_factor,
    )

  def encode(
    self, images: Float[Array, "b h w rgb"]
  ) -> Float[Array, "b h2 w2 c"]:
    """Encodes images, without the scaling factor.

    Raises:
      ValueError: a side that is not a multiple of `spatial_compression`.
    """
    height, width = images.shape[1:3]
    if height % self.spatial_compression or width % self.spatial_compression:
      raise ValueError(
        f"images of {height}x{width} cannot be encoded: both sides must be "
        f"multiples of {self.spatial_compression}; resize or crop them."
      )
    return self.encoder(images)

  def decode(
    self, latents: Float[Array, "b h w c"]
  ) -> Float[Array, "b h2 w2 rgb"]:
    """Decodes latents (divided by the scaling factor); values are unbounded."""
    return self.decoder(latents)


def _blocks(
  stage: StageSpec,
  head_dim: int,
  *,
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  rngs: nnx.Rngs,
) -> list[nnx.Module]:
  common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
  if stage.block == "ResBlock":
    return [
      efficientvit.ResBlock(
        stage.width, norm=stage.norm, activation=stage.activation, **common
      )
      for _ in range(stage.depth)
    ]
  return [
    efficientvit.EfficientViTBlock(
      stage.width,
      head_dim=head_dim,
      scales=stage.scales,
      norm=stage.norm,
      **common,
    )
    for _ in range(stage.depth)
  ]


def _run_blocks(
  blocks: Sequence[nnx.Module], x: Float[Array, "b h w c"], remat: str
) -> Float[Array, "b h w c"]:
  apply = stack.checkpointed(
    lambda block, x: block(stack.block_input(x)), remat
  )
  for block in blocks:
    x = apply(block, x)
  return x


def _check_shortcut(used: bool, name: str, width: int, latents: int) -> None:
  if used and width % latents:
    raise ValueError(
      f"{name}: the last stage's {width} channels must be a multiple of "
      f"latent_channels ({latents})."
    )


# Matrices are sharded along the model's width, convolutions along their output
# channels. Vectors and depthwise kernels are small and stay whole.
PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"/conv(1|2|_in|_out)?/kernel$", (None, None, None, "embed")),
  (r"/conv(1|2|_in|_out)?/bias$", (None,)),
  (r"/norm(_out)?/(scale|bias|mean|var)$", (None,)),
  (r"/attention/qkv/kernel$", ("embed", "heads")),
  (r"/attention/branches/\d+/depth_kernel$", (None, None, None)),
  (r"/attention/branches/\d+/point_kernel$", ("heads", None, None)),
  (r"/attention/out/kernel$", ("heads", "embed")),
  (r"/ffn/inverted/kernel$", ("fused_embed", "fused")),
  (r"/ffn/(inverted/bias|depth_bias)$", (None,)),
  (r"/ffn/depth_kernel$", (None, None, None)),
  (r"/ffn/point/kernel$", ("mlp", "embed")),
)
