"""Published SANA transformer checkpoints: their tensor names and layouts.

There are two: that of diffusers repositories, and the original `.pth` files,
which keep queries, keys and values in one tensor, as this project does.
"""

import numpy as np

from sana_jax import config as config_lib
from sana_jax.weights import mapping

# Regular expressions of tensors in original files that are no parameters of
# the network: a cached positional embedding, the null caption used in
# training, the loss weighting head of SANA-Sprint, and a control branch, which
# `weights/controlnet.py` reads from the same file.
ORIGINAL_IGNORED = (
  r"pos_embed",
  r"y_embedder\.y_embedding",
  r"logvar_linear\.(weight|bias)",
  r"controlnet\..*",
)

# Our module, the modules of a diffusers file, the module of an original file.
_Row = tuple[str, tuple[str, ...], str]

_LINEARS: tuple[_Row, ...] = (
  ("time_modulation", ("time_embed.linear",), "t_block.1"),
  (
    "caption_embed/linear_1",
    ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc1",
  ),
  (
    "caption_embed/linear_2",
    ("caption_projection.linear_2",),
    "y_embedder.y_proj.fc2",
  ),
)
_HEAD: _Row = ("head/projection", ("proj_out",), "final_layer.linear")
_BLOCK_LINEARS: tuple[_Row, ...] = (
  ("self_attention/out", ("attn1.to_out.0",), "attn.proj"),
  ("cross_attention/q", ("attn2.to_q",), "cross_attn.q_linear"),
  (
    "cross_attention/kv",
    ("attn2.to_k", "attn2.to_v"),
    "cross_attn.kv_linear",
  ),
  ("cross_attention/out", ("attn2.to_out.0",), "cross_attn.proj"),
)
_QKV: _Row = (
  "self_attention/qkv",
  ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
  "attn.qkv",
)
_QK_NORMS: tuple[_Row, ...] = (
  ("self_attention/norm_q", ("attn1.norm_q",), "attn.q_norm"),
  ("self_attention/norm_k", ("attn1.norm_k",), "attn.k_norm"),
  ("cross_attention/norm_q", ("attn2.norm_q",), "cross_attn.q_norm"),
  ("cross_attention/norm_k", ("attn2.norm_k",), "cross_attn.k_norm"),
)


def diffusers_rules(config: config_lib.SanaConfig) -> list[mapping.Rule]:
  """Names of `transformer/diffusion_pytorch_model.safetensors`."""
  return _rules(config, original=False)


def original_rules(config: config_lib.SanaConfig) -> list[mapping.Rule]:
  """Names of the `state_dict` of an original `.pth` file."""
  return _rules(config, original=True)


def _rules(
  config: config_lib.SanaConfig, *, original: bool
) -> list[mapping.Rule]:
  rules = embedding_rules(
    config, guidance_embeds=config.guidance_embeds, original=original
  )
  rules.append(
    mapping.Rule(
      "head/scale_shift_table",
      ("final_layer.scale_shift_table" if original else "scale_shift_table",),
    )
  )
  rules += linear_rules(_HEAD[0], (_HEAD[2],) if original else _HEAD[1])
  stack = "blocks" if original else "transformer_blocks"
  for i in range(config.num_layers):
    rules += block_rules(
      config,
      i,
      f"{stack}.{i}",
      qk_norm=config.qk_norm is not None,
      original=original,
    )
  return rules


def embedding_rules(
  config: config_lib.SanaBlocksConfig, *, guidance_embeds: bool, original: bool
) -> list[mapping.Rule]:
  """The modules that embed patches, time and text."""
  rules = [
    *_patch_embed(
      config.patch_size, "x_embedder" if original else "patch_embed"
    ),
    mapping.Rule(
      "caption_embed/norm/scale",
      ("attention_y_norm.weight" if original else "caption_norm.weight",),
    ),
  ]
  for row in _LINEARS + _time_embeds(guidance_embeds):
    rules += linear_rules(row[0], (row[2],) if original else row[1])
  return rules


def _time_embeds(guidance_embeds: bool) -> tuple[_Row, ...]:
  # diffusers nests the module one deeper when there is no guidance.
  nested = "" if guidance_embeds else "emb."
  modules = [
    ("time_embed", f"time_embed.{nested}timestep_embedder", "t_embedder")
  ]
  if guidance_embeds:
    modules.append(
      ("guidance_embed", "time_embed.guidance_embedder", "cfg_embedder")
    )
  return tuple(
    (
      f"{ours}/linear_{i + 1}",
      (f"{theirs}.linear_{i + 1}",),
      f"{old}.mlp.{2 * i}",
    )
    for ours, theirs, old in modules
    for i in range(2)
  )


def block_rules(
  config: config_lib.SanaBlocksConfig,
  i: int,
  prefix: str,
  *,
  qk_norm: bool,
  original: bool,
) -> list[mapping.Rule]:
  """Block `i` of our `blocks`, whose published names begin with `prefix`."""

  def names(row: _Row) -> tuple[str, ...]:
    modules = (row[2],) if original else row[1]
    return tuple(f"{prefix}.{module}" for module in modules)

  rules = [
    mapping.Rule(
      "blocks/scale_shift_table", (f"{prefix}.scale_shift_table",), index=i
    )
  ]
  rules += linear_rules(
    f"blocks/{_QKV[0]}", names(_QKV), bias=config.attention_bias, index=i
  )
  for row in _BLOCK_LINEARS:
    rules += linear_rules(f"blocks/{row[0]}", names(row), index=i)
  if qk_norm:
    rules += [
      mapping.Rule(
        f"blocks/{row[0]}/scale", (f"{names(row)[0]}.weight",), index=i
      )
      for row in _QK_NORMS
    ]
  if config.norm_elementwise_affine:
    rules += [
      mapping.Rule("blocks/norm2/scale", (f"{prefix}.norm2.weight",), index=i),
      mapping.Rule("blocks/norm2/bias", (f"{prefix}.norm2.bias",), index=i),
    ]
  return rules + _ffn(prefix, i, original)


def _ffn(prefix: str, i: int, original: bool) -> list[mapping.Rule]:
  inverted, depth, point = (
    f"{prefix}.mlp.{name}_conv.conv" if original else f"{prefix}.ff.conv_{name}"
    for name in ("inverted", "depth", "point")
  )
  tensors = (
    ("inverted/kernel", f"{inverted}.weight", mapping.CONV1X1),
    ("inverted/bias", f"{inverted}.bias", mapping.IDENTITY),
    ("depth_kernel", f"{depth}.weight", mapping.DEPTHWISE),
    ("depth_bias", f"{depth}.bias", mapping.IDENTITY),
    ("point/kernel", f"{point}.weight", mapping.CONV1X1),
  )
  return [
    mapping.Rule(f"blocks/ffn/{path}", (name,), *transform, index=i)
    for path, name, transform in tensors
  ]


def linear_rules(
  path: str,
  modules: tuple[str, ...],
  *,
  bias: bool = True,
  index: int | None = None,
) -> list[mapping.Rule]:
  """Our `path`, of the concatenated outputs of the named linear modules."""
  weights = tuple(f"{module}.weight" for module in modules)
  biases = tuple(f"{module}.bias" for module in modules)
  rules = [
    mapping.Rule(f"{path}/kernel", weights, *mapping.LINEAR, index=index)
  ]
  if bias:
    rules.append(mapping.Rule(f"{path}/bias", biases, index=index))
  return rules


def _patch_embed(patch_size: int, module: str) -> list[mapping.Rule]:
  p = patch_size

  # [out, channel, row, column] <-> [(row, column, channel), out]
  def to_jax(w: np.ndarray) -> np.ndarray:
    return w.transpose(2, 3, 1, 0).reshape(-1, w.shape[0])

  def to_torch(w: np.ndarray) -> np.ndarray:
    return w.reshape(p, p, -1, w.shape[-1]).transpose(3, 2, 0, 1)

  return [
    mapping.Rule(
      "patch_embed/projection/kernel",
      (f"{module}.proj.weight",),
      to_jax,
      to_torch,
    ),
    mapping.Rule("patch_embed/projection/bias", (f"{module}.proj.bias",)),
  ]
