"""SanaTransformer: a linear diffusion transformer for latent images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Num

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.models import sana_block
from sana_jax.nn import attention, embeddings, layers, stack

# Of the output head, whatever `norm_eps` says of the blocks.
HEAD_NORM_EPS = 1e-6
# Logical axes of the residual stream.
STREAM_AXES = ("batch", "rows", None, None)


class OutputHead(nnx.Module):
  """linear(modulate(norm(x))), modulated by the time embedding itself."""

  def __init__(
    self,
    features: int,
    out_features: int,
    *,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
  ):
    self.scale_shift_table = sana_block.scale_shift_table(
      2, features, param_dtype, rngs
    )
    self.norm = layers.LayerNorm(features, eps=HEAD_NORM_EPS)
    self.projection = layers.Linear(
      features, out_features, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )

  def __call__(
    self, x: Float[Array, "b h w d"], embedded: Float[Array, "b d"]
  ) -> Float[Array, "b h w o"]:
    y = self.projection(self.normalise(x, embedded))
    return y.astype(jnp.float32)  # Samplers and losses work in float32.

  def normalise(
    self, x: Float[Array, "b h w d"], embedded: Float[Array, "b d"]
  ) -> Float[Array, "b h w d"]:
    shift, scale = sana_block.rows_of(self.scale_shift_table, embedded[:, None])
    return sana_block.modulate(self.norm(x), shift, scale)


class SanaTransformer(nnx.Module):
  """Predicts the velocity of noisy latents, given a time and a text.

  The residual stream, norms, modulation, softmax, linear attention and time
  embedding are float32; the matrix products are in `dtype`. The parameters of
  all blocks share a leading axis in `blocks`.

  Args:
    scan: True compiles one block, False unrolls them.
    remat: what the backward pass keeps; see `stack.run_blocks`.

  Source: Xie et al., SANA, arXiv:2410.10629; SANA-1.5, arXiv:2501.18427;
  SANA-Sprint, arXiv:2503.09641.
  """

  def __init__(
    self,
    width: int,
    *,
    in_channels: int,
    out_channels: int,
    caption_channels: int,
    patch_size: int,
    base_size: int,
    interpolation_scale: float | None,
    guidance_embeds: bool,
    make_block: Callable[[jax.Array], sana_block.SanaBlock],
    num_layers: int,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    scan: bool = True,
    remat: str = "none",
    rngs: nnx.Rngs,
  ):
    self.in_channels = in_channels
    self.caption_channels = caption_channels
    self.patch_size = patch_size
    self.scan = scan
    self.remat = remat
    common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.patch_embed = embeddings.PatchEmbed(
      in_channels,
      width,
      patch_size=patch_size,
      base_size=base_size,
      interpolation_scale=interpolation_scale,
      **common,
    )
    float32 = {"param_dtype": param_dtype, "rngs": rngs}
    normal = nnx.initializers.normal(0.02)
    self.time_embed = embeddings.TimeEmbed(
      width, kernel_inits=(normal, normal), **float32
    )
    # Its output starts at zero: a student begins as its unguided teacher.
    inits = (nnx.initializers.xavier_uniform(), nnx.initializers.zeros_init())
    self.guidance_embed = (
      embeddings.TimeEmbed(width, kernel_inits=inits, **float32)
      if guidance_embeds
      else None
    )
    self.time_modulation = layers.Linear(
      width, 6 * width, kernel_init=normal, **float32
    )
    self.caption_embed = embeddings.CaptionEmbed(
      caption_channels, width, **common
    )
    self.blocks = stack.make_blocks(make_block, rngs.params(), num_layers)
    self.head = OutputHead(width, patch_size**2 * out_channels, **common)

  @classmethod
  def from_config(
    cls,
    config: config_lib.SanaConfig,
    *,
    fp16_clamp: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    scan: bool = True,
    remat: str = "none",
    rngs: nnx.Rngs,
  ) -> "SanaTransformer":
    """Builds the model with fresh parameters.

    Args:
      fp16_clamp: for weights trained in float16, see
        `attention.LinearSelfAttention`.

    Raises:
      ValueError: sizes in the config that do not fit together.
    """
    config.validate()
    return cls(
      config.width,
      in_channels=config.in_channels,
      out_channels=config.out_channels or config.in_channels,
      caption_channels=config.caption_channels,
      patch_size=config.patch_size,
      base_size=config.sample_size // config.patch_size,
      interpolation_scale=config.interpolation_scale,
      guidance_embeds=config.guidance_embeds,
      make_block=sana_block.block_builder(
        config,
        qk_norm=config.qk_norm is not None,
        fp16_clamp=fp16_clamp,
        dtype=dtype,
        param_dtype=param_dtype,
      ),
      num_layers=config.num_layers,
      dtype=dtype,
      param_dtype=param_dtype,
      scan=scan,
      remat=remat,
      rngs=rngs,
    )

  @property
  def fp16_clamp(self) -> bool:
    return self.blocks.self_attention.fp16_clamp

  def __call__(
    self,
    latents: Float[Array, "b h w c"],
    timestep: Num[Array, " b"],
    text: Float[Array, "b l caption"] | attention.KeysValues,
    text_mask: Bool[Array, "b l"] | None = None,
    *,
    guidance: Float[Array, " b"] | None = None,
    identity_attention: Bool[Array, "layers b"] | None = None,
    residuals: Float[Array, "n b h2 w2 d"] | None = None,
    residuals_after: int = 1,
  ) -> Float[Array, "b h w out"]:
    """Runs the network.

    Args:
      timestep: in the units the checkpoint was trained with: 1000 sigma for
        SANA and SANA-1.5, the flow time in [0, 1] for SANA-Sprint.
      text: the text encoder's last hidden states, or what `encode_text` makes
        of them.
      text_mask: True where a token is to be attended; None attends to all.
      guidance: guidance scale times `guidance_embeds_scale`; for models with
        `guidance_embeds`, and only for them.
      identity_attention: True where a block's self-attention is replaced by the
        identity for a sample; see `guidance.perturbed_attention`.
      residuals: of a control branch; see `controlnet.control_residuals`.
      residuals_after: the block (the first is 0) after which the first of them
        is added to the residual stream; each further one a block later.

    Raises:
      ValueError: an input of the wrong shape, guidance missing or unused, or
        residuals for more blocks than there are.
    """
    self._check_inputs(latents, timestep, text, text_mask, guidance)
    if residuals is not None:
      self._check_residuals(residuals, residuals_after, latents)
    latents = sharding.constrain(latents, STREAM_AXES)
    embedded, modulation = self.embed_time(timestep, guidance)
    encoded = text if isinstance(text, attention.KeysValues) else None
    caption = self._embed_text(text) if encoded is None else None
    control = (
      None
      if residuals is None
      else jnp.arange(self.num_layers) - residuals_after
    )

    def run_block(block, x, encoded, identity, control):
      x = sharding.constrain(x, STREAM_AXES)
      text = caption if encoded is None else encoded
      x = block(x, modulation, text, text_mask, identity)
      return x if control is None else _add_residual(x, residuals, control)

    x = stack.run_blocks(
      run_block,
      self.patch_embed(latents),
      self.blocks,
      encoded,
      identity_attention,
      control,
      scan=self.scan,
      remat=self.remat,
    )
    x = sharding.constrain(x, STREAM_AXES)
    return embeddings.unpatchify(self.head(x, embedded), self.patch_size)

  def encode_text(
    self, text: Float[Array, "b l caption"]
  ) -> attention.KeysValues:
    """Computes what does not depend on the time: `text` for many calls.

    Its bytes are 2 num_layers b l width, times those of a number in `dtype`.
    """
    return sana_block.encode_for_blocks(
      self.blocks, self._embed_text(text), scan=self.scan
    )

  def _embed_text(
    self, text: Float[Array, "b l caption"]
  ) -> Float[Array, "b l d"]:
    return sharding.constrain(self.caption_embed(text), ("batch", None, None))

  def embed_time(
    self,
    timestep: Num[Array, " b"],
    guidance: Float[Array, " b"] | None = None,
  ) -> tuple[Float[Array, "b d"], Float[Array, "b 6 d"]]:
    """Returns the time embedding and the modulation that blocks share."""
    embedded = self.time_embed(timestep)
    if self.guidance_embed is not None:
      embedded = embedded + self.guidance_embed(guidance)
    modulation = self.time_modulation(jax.nn.silu(embedded))
    return embedded, modulation.reshape(embedded.shape[0], 6, -1)

  @property
  def num_layers(self) -> int:
    return self.blocks.scale_shift_table.shape[0]

  @property
  def cross_head_dim(self) -> int:
    return self.blocks.cross_attention.head_dim

  @property
  def width(self) -> int:
    return self.blocks.scale_shift_table.shape[-1]

  def _check_residuals(self, residuals, first, latents):
    batch, height, width, _ = latents.shape
    patches = (height // self.patch_size, width // self.patch_size)
    shape = ("blocks", batch, *patches, self.width)
    _check_shape("residuals", residuals, shape)
    if first < 0 or first + residuals.shape[0] > self.num_layers:
      raise ValueError(
        f"{residuals.shape[0]} residuals, the first after block {first}, do "
        f"not fit a model of {self.num_layers} blocks."
      )

  def _check_inputs(self, latents, timestep, text, text_mask, guidance):
    channels, captions = self.in_channels, self.caption_channels
    _check_shape("latents", latents, ("batch", "height", "width", channels))
    batch, height, width, _ = latents.shape
    if height % self.patch_size or width % self.patch_size:
      raise ValueError(
        f"latents of {height}x{width} do not divide into patches of "
        f"{self.patch_size}x{self.patch_size}."
      )
    _check_shape("timestep", timestep, (batch,))
    if isinstance(text, attention.KeysValues):
      heads = self.width // self.cross_head_dim
      shape = (self.num_layers, batch, "tokens", heads, self.cross_head_dim)
      for name, array in text._asdict().items():
        _check_shape(f"{name} of the text", array, shape)
      length = text.keys.shape[2]
    else:
      _check_shape("text", text, (batch, "tokens", captions))
      length = text.shape[1]
    if text_mask is not None:
      _check_shape("text_mask", text_mask, (batch, length))
      if text_mask.dtype != jnp.bool_:
        raise ValueError(
          f"text_mask must be bool, True where a token is kept; got "
          f"{text_mask.dtype}."
        )
    if (guidance is None) != (self.guidance_embed is None):
      verb = "needs" if guidance is None else "does not take"
      raise ValueError(
        f"this model {verb} guidance: it was built with "
        f"guidance_embeds={self.guidance_embed is not None}."
      )
    if guidance is not None:
      _check_shape("guidance", guidance, (batch,))


def _add_residual(
  x: Float[Array, "b h w d"],
  residuals: Float[Array, "n b h w d"],
  index: Int[Array, ""],
) -> Float[Array, "b h w d"]:
  """Adds residual `index`, if there is one."""
  last = residuals.shape[0] - 1
  # Indexed here, not sliced by the scan: padding to all blocks takes memory.
  residual = jax.lax.dynamic_index_in_dim(
    residuals, jnp.clip(index, 0, last), keepdims=False
  )
  return x + jnp.where((index >= 0) & (index <= last), residual, 0)


def _check_shape(name: str, array: Array, expected: tuple[int | str, ...]):
  fits = len(array.shape) == len(expected) and all(
    isinstance(size, str) or size == n
    for size, n in zip(expected, array.shape, strict=True)
  )
  if not fits:
    raise ValueError(
      f"{name} must have shape ({', '.join(map(str, expected))}), "
      f"got {tuple(array.shape)}."
    )


# Matrices are sharded along the width, and along what is expanded from it.
# Vectors, tables and the depthwise kernels are small and stay whole.
PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"^blocks/scale_shift_table$", ("layers", None, None)),
  (r"^blocks/.*attention/(kv|qkv)/kernel$", ("layers", "fused_embed", "fused")),
  (r"^blocks/cross_attention/q/kernel$", ("layers", "embed", "heads")),
  (r"^blocks/.*attention/(q|kv|qkv)/bias$", ("layers", None)),
  (r"^blocks/.*attention/norm_[qk]/scale$", ("layers", None)),
  (r"^blocks/.*attention/out/kernel$", ("layers", "heads", "embed")),
  (r"^blocks/.*attention/out/bias$", ("layers", None)),
  (r"^blocks/norm2/(scale|bias)$", ("layers", None)),
  (r"^blocks/ffn/inverted/kernel$", ("layers", "fused_embed", "fused")),
  (r"^blocks/ffn/(inverted/bias|depth_bias)$", ("layers", None)),
  (r"^blocks/ffn/depth_kernel$", ("layers", None, None, None)),
  (r"^blocks/ffn/point/kernel$", ("layers", "mlp", "embed")),
  (r"^(patch_embed|head)/projection/bias$", (None,)),
  (r"^patch_embed/projection/kernel$", (None, "embed")),
  (r"^(time|guidance)_embed/linear_1/kernel$", (None, "embed")),
  (r"^(time|guidance)_embed/linear_2/kernel$", ("embed", None)),
  (r"^time_modulation/kernel$", ("embed", None)),
  (r"^caption_embed/linear_1/kernel$", (None, "embed")),
  (r"^caption_embed/linear_2/kernel$", ("embed", None)),
  (r"^(time|guidance|caption)_embed/linear_[12]/bias$", (None,)),
  (r"^time_modulation/bias$", (None,)),
  (r"^caption_embed/norm/scale$", (None,)),
  (r"^head/scale_shift_table$", (None, None)),
  (r"^head/projection/kernel$", ("embed", None)),
)
