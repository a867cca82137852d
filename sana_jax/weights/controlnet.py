"""Published SANA ControlNets: their tensor names and layouts.

There are two: that of diffusers repositories, and the original `.pth` files,
which hold a whole transformer besides, whose embeddings the branch shares.
"""

from sana_jax import config as config_lib
from sana_jax.weights import mapping
from sana_jax.weights import sana as sana_weights

# Regular expressions of tensors in original files that belong to the
# transformer alone.
ORIGINAL_IGNORED = (
  r"pos_embed",
  r"y_embedder\.y_embedding",
  r"blocks\..*",
  r"final_layer\..*",
)


def diffusers_rules(
  config: config_lib.SanaControlNetConfig,
) -> list[mapping.Rule]:
  """Names of `controlnet/diffusion_pytorch_model.safetensors`."""
  return _rules(
    config,
    block="transformer_blocks.{}",
    into="input_block",
    out="controlnet_blocks.{}",
    original=False,
  )


def original_rules(
  config: config_lib.SanaControlNetConfig,
) -> list[mapping.Rule]:
  """Names of the `state_dict` of an original `.pth` file."""
  return _rules(
    config,
    block="controlnet.{}.copied_block",
    into="controlnet.0.before_proj",
    out="controlnet.{}.after_proj",
    original=True,
  )


def _rules(
  config: config_lib.SanaControlNetConfig,
  *,
  block: str,
  into: str,
  out: str,
  original: bool,
) -> list[mapping.Rule]:
  rules = sana_weights.embedding_rules(
    config, guidance_embeds=False, original=original
  )
  rules += sana_weights.linear_rules("input_projection", (into,))
  for i in range(config.num_layers):
    rules += sana_weights.block_rules(
      config, i, block.format(i), qk_norm=False, original=original
    )
    rules += sana_weights.linear_rules(
      "output_projections", (out.format(i),), index=i
    )
  return rules
