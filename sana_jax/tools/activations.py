"""The forward pass of a SanaTransformer, written out with its public parts."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from sana_jax.models import sana, sana_block
from sana_jax.nn import embeddings


def names(num_layers: int) -> list[str]:
  """Lists what `compute` returns, in the order of the forward pass."""
  return [
    *("time_embed.embedded", "time_embed.modulation", "patch_embed"),
    *("caption_projection", "caption_norm"),
    *(
      f"block{i}{part}"
      for i in range(num_layers)
      for part in (".attn1", ".attn2", ".ff", "")
    ),
    *("norm_out", "proj_out", "sample"),
  ]


def compute(
  model: sana.SanaTransformer,
  latents: Float[Array, "b h w c"],
  timestep: Num[Array, " b"],
  text: Float[Array, "b l caption"],
  text_mask: Bool[Array, "b l"] | None = None,
  *,
  guidance: Float[Array, " b"] | None = None,
) -> dict[str, Array]:
  """Returns the output of every part of the network, `sample` its own.

  Tokens are [batch, tokens, channels]; `ff` and `sample` are images, channels
  last. The outputs of attentions and Mix-FFNs are those before gate and sum.

  Args:
    timestep: see `SanaTransformer.__call__`, as the others.
  """
  embedded, modulation = model.embed_time(timestep, guidance)
  x = model.patch_embed(latents)
  projected = model.caption_embed.project(text)
  caption = model.caption_embed.norm(projected)
  parts = {
    "time_embed.embedded": embedded,
    "time_embed.modulation": modulation.reshape(len(timestep), -1),
    "patch_embed": _tokens(x),
    "caption_projection": projected,
    "caption_norm": caption,
  }
  for i in range(num_layers(model)):
    block = jax.tree.map(lambda leaf: leaf[i], model.blocks)  # noqa: B023
    x, of_block = _block(block, x, modulation, caption, text_mask)
    parts |= {f"block{i}{name}": value for name, value in of_block.items()}
  normed = model.head.normalise(x, embedded)
  patches = model.head.projection(normed).astype(jnp.float32)
  return parts | {
    "norm_out": _tokens(normed),
    "proj_out": _tokens(patches),
    "sample": embeddings.unpatchify(patches, model.patch_size),
  }


def num_layers(model: sana.SanaTransformer) -> int:
  return jax.tree.leaves(model.blocks)[0].shape[0]


def _block(block, x, modulation, caption, text_mask):
  shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(modulation)
  image = block.attend_image(
    sana_block.modulate(block.norm1(x), shift1, scale1)
  )
  x = x + gate1 * image
  text = block.attend_text(x, caption, text_mask)
  x = x + text
  ffn = block.ffn(sana_block.modulate(block.norm2(x), shift2, scale2))
  x = x + gate2 * ffn
  return x, {
    ".attn1": _tokens(image),
    ".attn2": _tokens(text),
    ".ff": ffn,
    "": _tokens(x),
  }


def _tokens(x: Float[Array, "b h w d"]) -> Float[Array, "b n d"]:
  return x.reshape(x.shape[0], -1, x.shape[-1])
