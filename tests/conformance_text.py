"""Runs a reference case of the text encoder through the public interface."""

import json
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx

from sana_jax import text
from sana_jax.models import gemma2
from sana_jax.weights import gemma2 as gemma2_weights
from sana_jax.weights import mapping

Arrays = dict[str, np.ndarray]


def text_case(
  case: dict[str, Any], inputs: Arrays, case_dir: pathlib.Path
) -> Arrays:
  """Returns the outputs of a case under the reference's names.

  Args:
    case: the contents of case.json.
    inputs: the `in.` tensors, with their prefix.
    case_dir: where the model and its tokenizer are.
  """
  with jax.default_matmul_precision("highest"), warnings.catch_warnings():
    warnings.filterwarnings("ignore", "A prompt has")
    if "runs" in case:
      outputs = _encode_prompt_case(case, case_dir)
    else:
      outputs = _gemma2_case(case, inputs, case_dir)
  return {f"out.{name}": value for name, value in outputs.items()}


def load_text_encoder(directory: pathlib.Path) -> gemma2.Gemma2:
  values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
  config = gemma2_weights.gemma2_config(values)
  tensors = {}
  for path in sorted(directory.glob("*.safetensors")):
    tensors |= safetensors.numpy.load_file(path)
  abstract = jax.eval_shape(
    lambda key: gemma2.Gemma2.from_config(config, rngs=nnx.Rngs(key)),
    jax.random.key(0),
  )
  return mapping.load(
    abstract,
    gemma2_weights.diffusers_rules(config),
    gemma2_weights.strip_prefix(tensors),
    source=str(directory),
  )


def _gemma2_case(
  case: dict[str, Any], inputs: Arrays, case_dir: pathlib.Path
) -> Arrays:
  model = load_text_encoder(case_dir / "text_encoder")
  tokenizer = text.Tokenizer.from_pretrained(case_dir / "tokenizer")
  run = jax.jit(lambda model, *args: model(*args))
  out = {}
  for side in ("right", "left"):
    ids, mask = tokenizer.encode(case["texts"], case["max_length"], side)
    hidden = np.asarray(run(model, jnp.asarray(ids), jnp.asarray(mask)))
    out[f"{side}.input_ids"] = ids.astype(np.int64)
    out[f"{side}.attention_mask"] = mask.astype(np.int64)
    if side == "left":
      out["left.last_hidden_state_masked"] = hidden * mask[..., None]
      continue
    out["right.last_hidden_state"] = hidden
    states = model.hidden_states(jnp.asarray(ids), jnp.asarray(mask))
    for i, state in enumerate(states):
      out[f"right.hidden_states.{i}"] = np.asarray(state)
  ids = jnp.asarray(inputs["in.nomask.input_ids"], jnp.int32)
  out["nomask.last_hidden_state"] = np.asarray(run(model, ids))
  if (case_dir / "causal_lm").is_dir():
    causal_lm = load_text_encoder(case_dir / "causal_lm")
    logits = causal_lm.logits(run(causal_lm, ids)[:, -1:])
    out["nomask.causal_lm_logits_last"] = np.asarray(logits)[:, 0]
  return out


def _encode_prompt_case(case: dict[str, Any], case_dir: pathlib.Path) -> Arrays:
  model = load_text_encoder(case_dir / "text_encoder")
  tokenizer = text.Tokenizer.from_pretrained(case_dir / "tokenizer")
  out = {}
  for name, run in case["runs"].items():
    for key, value in _encode_prompt_run(model, tokenizer, run):
      out[f"{name}.{key}"] = value
  return out


def _encode_prompt_run(
  model: gemma2.Gemma2, tokenizer: text.Tokenizer, run: dict[str, Any]
) -> Iterator[tuple[str, np.ndarray]]:
  prompts = run["prompt"]
  prompts = [prompts] if isinstance(prompts, str) else prompts
  instruction = run.get("complex_human_instruction")
  if isinstance(instruction, str):
    instruction = text.default_instruction()
  length = run.get("max_sequence_length", 300)
  per_prompt = run.get("num_images_per_prompt", 1)
  ids, mask = text.tokenize_prompts(
    tokenizer,
    prompts,
    complex_human_instruction=instruction,
    max_sequence_length=length,
  )
  yield "input_ids", ids.astype(np.int64)
  yield "input_attention_mask", mask.astype(np.int64)
  embeds, mask = text.encode_prompts(
    model,
    tokenizer,
    prompts,
    complex_human_instruction=instruction,
    max_sequence_length=length,
  )
  yield "prompt_embeds", np.repeat(np.asarray(embeds), per_prompt, axis=0)
  yield "prompt_attention_mask", _ints(mask, per_prompt)
  if not run.get("do_classifier_free_guidance", True):
    return
  negative = run.get("negative_prompt", "")
  if isinstance(negative, str):
    negative = [negative] * len(prompts)
  embeds, mask = text.encode_prompts(
    model, tokenizer, negative, max_sequence_length=length
  )
  embeds = np.asarray(embeds)
  yield "negative_prompt_embeds", np.repeat(embeds, per_prompt, axis=0)
  yield "negative_prompt_attention_mask", _ints(mask, per_prompt)


def _ints(mask: jax.Array, repeats: int) -> np.ndarray:
  return np.repeat(np.asarray(mask).astype(np.int64), repeats, axis=0)
