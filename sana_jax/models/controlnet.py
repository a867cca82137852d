"""SanaControlNet: a branch that steers a SanaTransformer by a second image."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Num, Real

from sana_jax import config as config_lib
from sana_jax.models import sana, sana_block
from sana_jax.nn import attention, embeddings, layers, stack

WIRINGS = ("diffusers", "original")


class ControlText(NamedTuple):
  """What a branch reads of a text; see `encode_text`.

  Attributes:
    branch: for its own blocks.
    first: for the transformer's block 0, in the original wiring.
  """

  branch: attention.KeysValues
  first: attention.KeysValues | None


class SanaControlNet(nnx.Module):
  """Computes what is added to the residual stream of a transformer.

  Copies of the transformer's first blocks run on the latents plus the projected
  control latents; each has a projection of its output. Both projections begin
  at zero: a fresh branch changes nothing.

  Args:
    scan: True compiles one block, False unrolls them.
    remat: what the backward pass keeps; see `stack.run_blocks`.

  Source: Chen et al., PixArt-delta, arXiv:2401.05252 (ControlNet-Transformer);
  diffusers' SanaControlNetModel.
  """

  def __init__(
    self,
    width: int,
    *,
    in_channels: int,
    caption_channels: int,
    patch_size: int,
    base_size: int,
    interpolation_scale: float | None,
    make_block: Callable[[jax.Array], sana_block.SanaBlock],
    num_layers: int,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    scan: bool = True,
    remat: str = "none",
    rngs: nnx.Rngs,
  ):
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
    normal = nnx.initializers.normal(0.02)
    float32 = {"param_dtype": param_dtype, "rngs": rngs}
    self.time_embed = embeddings.TimeEmbed(
      width, kernel_inits=(normal, normal), **float32
    )
    self.time_modulation = layers.Linear(
      width, 6 * width, kernel_init=normal, **float32
    )
    self.caption_embed = embeddings.CaptionEmbed(
      caption_channels, width, **common
    )

    def make_projection(key: jax.Array) -> layers.Linear:
      return layers.Linear(
        width,
        width,
        kernel_init=layers.ZEROS,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=nnx.Rngs(key),
      )

    self.input_projection = make_projection(rngs.params())
    self.blocks = stack.make_blocks(make_block, rngs.params(), num_layers)
    self.output_projections = stack.make_blocks(
      make_projection, rngs.params(), num_layers
    )

  @classmethod
  def from_config(
    cls,
    config: config_lib.SanaControlNetConfig,
    *,
    fp16_clamp: bool = False,
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    scan: bool = True,
    remat: str = "none",
    rngs: nnx.Rngs,
  ) -> "SanaControlNet":
    """Builds the branch with fresh parameters.

    Args:
      fp16_clamp: that of the transformer it steers.

    Raises:
      ValueError: sizes in the config that do not fit together.
    """
    config.validate()
    return cls(
      config.width,
      in_channels=config.in_channels,
      caption_channels=config.caption_channels,
      patch_size=config.patch_size,
      base_size=config.sample_size // config.patch_size,
      interpolation_scale=config.interpolation_scale,
      make_block=sana_block.block_builder(
        config,
        qk_norm=False,
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

  def __call__(
    self,
    latents: Float[Array, "b h w c"],
    control_latents: Float[Array, "b h w c"],
    timestep: Num[Array, " b"],
    text: Float[Array, "b l caption"] | attention.KeysValues,
    text_mask: Bool[Array, "b l"] | None = None,
  ) -> Float[Array, "n b h2 w2 d"]:
    """Returns the residuals of diffusers' wiring, one per block, unscaled.

    Args:
      control_latents: the control image as the autoencoder encodes it, scaled
        like latents.
      timestep: as for the transformer, like `text` and `text_mask`.
    """
    modulation = self.time_modulation(jax.nn.silu(self.time_embed(timestep)))
    control = self.patch_embed(control_latents)
    return self.run_blocks(
      self.patch_embed(latents),
      control,
      modulation.reshape(latents.shape[0], 6, -1),
      text
      if isinstance(text, attention.KeysValues)
      else self.caption_embed(text),
      text_mask,
    )

  def run_blocks(
    self,
    x: Float[Array, "b h w d"],
    control: Float[Array, "b h w d"],
    modulation: Float[Array, "b 6 d"],
    text: Float[Array, "b l d"] | attention.KeysValues,
    text_mask: Bool[Array, "b l"] | None,
  ) -> Float[Array, "n b h w d"]:
    """Computes the residuals from embedded inputs."""
    encoded = text if isinstance(text, attention.KeysValues) else None

    def run_block(block_and_projection, x, encoded):
      block, projection = block_and_projection
      x = block(x, modulation, text if encoded is None else encoded, text_mask)
      return x, projection(x).astype(jnp.float32)

    return stack.collect_blocks(
      run_block,
      # The residual stream is float32.
      x + self.input_projection(control).astype(jnp.float32),
      (self.blocks, self.output_projections),
      encoded,
      scan=self.scan,
      remat=self.remat,
    )[1]


def control_residuals(
  controlnet: SanaControlNet,
  transformer: sana.SanaTransformer,
  latents: Float[Array, "b h w c"],
  control_latents: Float[Array, "b h w c"],
  timestep: Num[Array, " b"],
  text: Float[Array, "b l caption"] | ControlText,
  text_mask: Bool[Array, "b l"] | None = None,
  *,
  conditioning_scale: Real[ArrayLike, ""] = 1.0,
  wiring: str = "diffusers",
) -> Float[Array, "n b h2 w2 d"]:
  """Computes `residuals` of a transformer; `first_block` says where they begin.

  Args:
    text: the states, or what `encode_text` makes of them in this wiring.
    conditioning_scale: factor of all residuals.
    wiring: "diffusers": the branch starts from the embedded latents, embeds
      time, text and patches by its own modules, and its residual i enters
      before block i + 2 (the first block is 0). "original", of the published
      `.pth` files: it starts from what the transformer's block 0 makes of them,
      all embeddings are the transformer's, and residual i enters before
      block i + 1. The two are different functions of the same weights.

  Raises:
    ValueError: an unknown wiring, a scale that is not finite, control latents
      of another size than the latents, or a branch that does not fit the
      transformer.
  """
  _check(controlnet, transformer, latents, control_latents, wiring)
  _check_scale(conditioning_scale)
  if not isinstance(text, ControlText):
    text = encode_text(controlnet, transformer, text, wiring=wiring)
  if wiring == "diffusers":
    residuals = controlnet(
      latents, control_latents, timestep, text.branch, text_mask
    )
  else:
    _, modulation = transformer.embed_time(timestep)
    embedded = transformer.patch_embed(latents)
    residuals = controlnet.run_blocks(
      _first(transformer)(embedded, modulation, text.first, text_mask),
      transformer.patch_embed(control_latents),
      modulation,
      text.branch,
      text_mask,
    )
  return residuals * jnp.asarray(conditioning_scale, residuals.dtype)


def encode_text(
  controlnet: SanaControlNet,
  transformer: sana.SanaTransformer,
  text: Float[Array, "b l caption"],
  *,
  wiring: str = "diffusers",
) -> ControlText:
  """Computes what does not depend on the time: `text` for many calls."""
  if wiring == "diffusers":
    caption, first = controlnet.caption_embed(text), None
  else:
    caption = transformer.caption_embed(text)
    first = _first(transformer).cross_attention.encode(caption)
  branch = sana_block.encode_for_blocks(
    controlnet.blocks, caption, scan=controlnet.scan
  )
  return ControlText(branch, first)


def _first(transformer: sana.SanaTransformer) -> sana_block.SanaBlock:
  return jax.tree.map(lambda leaf: leaf[0], transformer.blocks)


def first_block(wiring: str) -> int:
  """Returns the block after which the first residual is added.

  It is `residuals_after` of a transformer.

  Raises:
    ValueError: an unknown wiring.
  """
  if wiring not in WIRINGS:
    raise ValueError(f"wiring must be one of {WIRINGS}, got {wiring!r}.")
  return 1 if wiring == "diffusers" else 0


def _check(controlnet, transformer, latents, control_latents, wiring):
  first = first_block(wiring)
  problems = []
  if control_latents.shape != latents.shape:
    problems.append(
      f"control_latents have shape {control_latents.shape}, the latents "
      f"{latents.shape}: encode the control image at the size of the picture"
    )
  sizes = {
    "width": (
      controlnet.input_projection.kernel.shape[0],
      transformer.width,
    ),
    "patch size": (controlnet.patch_embed.patch_size, transformer.patch_size),
    "patch embedding": (
      controlnet.patch_embed.projection.kernel.shape,
      transformer.patch_embed.projection.kernel.shape,
    ),
    "caption width": (
      controlnet.caption_embed.linear_1.kernel.shape[0],
      transformer.caption_channels,
    ),
  }
  problems += [
    f"the {name} is {ours}, that of the transformer {theirs}"
    for name, (ours, theirs) in sizes.items()
    if ours != theirs
  ]
  depth = controlnet.output_projections.kernel.shape[0]
  if depth + first > transformer.num_layers:
    problems.append(
      f"{depth} residuals, the first after block {first}, are too many for a "
      f"transformer of {transformer.num_layers} blocks"
    )
  if wiring == "original" and transformer.guidance_embed is not None:
    problems.append(
      "the original wiring has no transformer with guidance_embeds"
    )
  if problems:
    raise ValueError("ControlNet: " + "; ".join(problems) + ".")


def _check_scale(scale: Real[ArrayLike, ""]):
  # Arrays may be traced, without a value to check.
  if isinstance(scale, int | float | np.generic) and not np.isfinite(scale):
    raise ValueError(f"conditioning_scale must be finite, got {scale}.")


PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"^input_projection/kernel$", ("embed", None)),
  (r"^input_projection/bias$", (None,)),
  (r"^output_projections/kernel$", ("layers", "embed", None)),
  (r"^output_projections/bias$", ("layers", None)),
  *sana.PARAM_AXES,
)
