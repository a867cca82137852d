"""Published Gemma 2 checkpoints: their config files and tensor names."""

from collections.abc import Mapping
from typing import Any

from sana_jax import config as config_lib
from sana_jax.weights import mapping

# Our parameter of a block, and the published name.
_BLOCK_KERNELS = (
  ("attention/query", "self_attn.q_proj"),
  ("attention/key", "self_attn.k_proj"),
  ("attention/value", "self_attn.v_proj"),
  ("attention/out", "self_attn.o_proj"),
  ("mlp/gate", "mlp.gate_proj"),
  ("mlp/up", "mlp.up_proj"),
  ("mlp/down", "mlp.down_proj"),
)
_BLOCK_NORMS = (
  ("pre_attention_norm", "input_layernorm"),
  ("post_attention_norm", "post_attention_layernorm"),
  ("pre_mlp_norm", "pre_feedforward_layernorm"),
  ("post_mlp_norm", "post_feedforward_layernorm"),
)

# Settings of `config.json` that would change the computation, and the only
# value under which this implementation computes it.
_FIXED = {
  "model_type": "gemma2",
  "hidden_activation": "gelu_pytorch_tanh",
  "attention_bias": False,
  "tie_word_embeddings": True,
  "use_bidirectional_attention": False,
  "rope_scaling": None,
}


def gemma2_config(values: Mapping[str, Any]) -> config_lib.Gemma2Config:
  """Reads a parsed `config.json`, of any generation of the format.

  Older files have `rope_theta` at the top level and leave `layer_types` out.

  Raises:
    ValueError: a setting that this implementation does not compute.
  """
  problems = [
    f"{name} must be {value!r}, got {values[name]!r}"
    for name, value in _FIXED.items()
    if values.get(name) not in (None, value)
  ]
  rope = values.get("rope_parameters") or {}
  if rope.get("rope_type", "default") != "default":
    problems.append(
      f"rope_parameters.rope_type must be 'default', got {rope['rope_type']!r}"
    )
  if problems:
    raise ValueError("text encoder config: " + "; ".join(problems) + ".")
  merged = {**values, **{k: v for k, v in rope.items() if k == "rope_theta"}}
  # Instruction-tuned checkpoints list several ends of text.
  if isinstance(merged.get("eos_token_id"), list):
    merged["eos_token_id"] = merged["eos_token_id"][0]
  return config_lib.from_dict(config_lib.Gemma2Config, merged)


def diffusers_rules(config: config_lib.Gemma2Config) -> list[mapping.Rule]:
  """Names of the bare decoder, the `text_encoder/` of a diffusers directory."""
  rules = [
    mapping.Rule("embedding", ("embed_tokens.weight",)),
    mapping.Rule("norm/scale", ("norm.weight",)),
  ]
  for i in range(config.num_hidden_layers):
    for ours, theirs in _BLOCK_KERNELS:
      rules.append(
        mapping.Rule(
          f"blocks/{ours}/kernel",
          (f"layers.{i}.{theirs}.weight",),
          *mapping.LINEAR,
          index=i,
        )
      )
    for ours, theirs in _BLOCK_NORMS:
      rules.append(
        mapping.Rule(
          f"blocks/{ours}/scale", (f"layers.{i}.{theirs}.weight",), index=i
        )
      )
  return rules


def strip_prefix(tensors: Mapping[str, Any]) -> dict[str, Any]:
  """Renames the tensors of a causal language model to the bare decoder's.

  Drops a stored `lm_head.weight`: it is the embedding.
  """
  return {
    name.removeprefix("model."): tensor
    for name, tensor in tensors.items()
    if name != "lm_head.weight"
  }
