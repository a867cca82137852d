"""The recipe that trains a SanaTransformer on latents of a fixed DCAE."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx
from jaxtyping import Array, Float

from sana_jax import config as config_lib
from sana_jax import images as images_lib
from sana_jax import pipeline as pipeline_lib
from sana_jax import text as text_lib
from sana_jax.data import examples
from sana_jax.diffusion import flow, schedules
from sana_jax.models import dc_ae, gemma2, sana
from sana_jax.pipeline import training_run
from sana_jax.training import loop
from sana_jax.weights import components


def make_recipe(config: config_lib.TextToImageConfig) -> loop.Recipe:
  """Loads what stays fixed, encodes the images once, and builds the rest."""
  autoencoder, autoencoder_config = components.load_autoencoder(
    config.autoencoder
  )
  tokenizer = text_lib.Tokenizer.from_pretrained(config.tokenizer)
  _check_vocabulary(config, tokenizer)
  logging.info("encoding the %s images", config.data.split)
  latents = encode_images(autoencoder, config.data)
  generation = training_run.generation_config(config)
  pipe = None

  def updated_pipeline(params, frozen) -> pipeline_lib.SanaPipeline:
    # One object for the whole run: it keeps its compiled programs.
    nonlocal pipe
    models = {"text_encoder": frozen.get("text_encoder"), **params}
    if pipe is None:
      pipe = pipeline_lib.SanaPipeline(
        **models,
        transformer_config=config.model,
        text_encoder_config=config.text_encoder,
        tokenizer=tokenizer,
        tokenizer_directory=config.tokenizer,
        autoencoder=autoencoder,
        autoencoder_config=autoencoder_config,
        solver=schedules.FlowDPMSolver(flow_shift=config.flow.shift),
        generation_config=generation,
      )
    pipe.transformer = models["transformer"]
    pipe.text_encoder = models["text_encoder"]
    return pipe

  def sample(params, frozen):
    output = updated_pipeline(params, frozen)(config.sample_prompts, seed=0)
    return images_lib.to_uint8(images_lib.grid(output.images))

  return loop.Recipe(
    init=lambda key: init_params(config, key),
    param_axes={
      "transformer": sana.PARAM_AXES,
      "text_encoder": gemma2.PARAM_AXES,
    },
    frozen=_frozen(config, tokenizer),
    loss_fn=functools.partial(flow_loss, config=config),
    dataset=examples.caption_examples(
      config.data,
      config.seed,
      latents * np.float32(autoencoder_config.scaling_factor),
      functools.partial(_tokenize, tokenizer, generation),
    ),
    sample=sample,
    export=lambda params, frozen, path: updated_pipeline(
      params, frozen
    ).save_pretrained(path),
  )


def init_params(
  config: config_lib.TextToImageConfig, key: jax.Array
) -> dict[str, Any]:
  """Builds the trained components with fresh parameters."""
  key_transformer, key_text = jax.random.split(key)
  build = {
    "dtype": jnp.dtype(config.dtype),
    "scan": config.scan_layers,
    "remat": config.remat,
  }
  params = {
    "transformer": sana.SanaTransformer.from_config(
      config.model, rngs=nnx.Rngs(key_transformer), **build
    )
  }
  if config.train_text_encoder:
    params["text_encoder"] = gemma2.Gemma2.from_config(
      config.text_encoder, rngs=nnx.Rngs(key_text), **build
    )
  return params


def flow_loss(
  params: dict[str, Any],
  frozen: dict[str, Any],
  key: jax.Array,
  batch: dict[str, Array],
  config: config_lib.TextToImageConfig,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
  """Computes the rectified-flow loss with caption dropout.

  Loss = mean || model(x_sigma, T, text) - (noise - latents) ||^2, where a
  dropped caption's text states are those of the empty caption.

  Source: SANA, arXiv:2410.10629, section 2.3.
  """
  key_drop, key_sigma, key_noise = jax.random.split(key, 3)
  latents = batch["latents"]
  text, text_mask = _encode_captions(params, frozen, key_drop, batch, config)
  sigma, timestep = flow.sample_sigma(
    key_sigma,
    latents.shape[0],
    shift=config.flow.shift,
    mean=config.flow.logit_mean,
    std=config.flow.logit_std,
  )
  noise = jax.random.normal(key_noise, latents.shape, jnp.float32)
  prediction = params["transformer"](
    flow.interpolate(latents, noise, sigma),
    timestep * config.model.timestep_scale,
    text,
    text_mask,
  )
  return flow.loss(prediction, flow.velocity(latents, noise)), {}


def _encode_captions(params, frozen, key, batch, config):
  """Returns text states and mask, some captions replaced by the empty one."""
  encoder = params.get("text_encoder", frozen.get("text_encoder"))
  length = config.max_sequence_length
  text, mask = text_lib.encode_tokens(
    encoder,
    batch["input_ids"],
    batch["attention_mask"],
    max_sequence_length=length,
  )
  null_text, null_mask = text_lib.encode_tokens(
    encoder, frozen["null_ids"], frozen["null_mask"], max_sequence_length=length
  )
  dropped = jax.random.bernoulli(
    key, config.flow.caption_dropout, (text.shape[0],)
  )
  text = jnp.where(dropped[:, None, None], null_text, text)
  if config.flow.null_mask == "own":
    mask = jnp.where(dropped[:, None], null_mask, mask)
  return text, mask


def encode_images(
  autoencoder: dc_ae.DCAE,
  config: config_lib.DataConfig,
  *,
  batch_size: int = 64,
) -> Float[np.ndarray, "n h w c"]:
  """Encodes every image of the split once; the latents stay in memory."""
  source = examples.load_source(config)
  encode = jax.jit(dc_ae.DCAE.encode)
  latents = []
  for start in range(0, len(source), batch_size):
    # The last batch is filled up, so that one shape is compiled.
    indices = [
      min(i, len(source) - 1) for i in range(start, start + batch_size)
    ]
    images = [examples.to_unit_range(source[i]["image"]) for i in indices]
    latents.append(
      np.asarray(encode(autoencoder, np.stack(images)), np.float32)
    )
  return np.concatenate(latents)[: len(source)]


def _tokenize(
  tokenizer: text_lib.Tokenizer,
  generation: pipeline_lib.GenerationConfig,
  caption: str,
) -> dict[str, np.ndarray]:
  input_ids, attention_mask = text_lib.tokenize_prompts(
    tokenizer,
    [caption],
    complex_human_instruction=generation.complex_human_instruction,
    max_sequence_length=generation.max_sequence_length,
  )
  return {"input_ids": input_ids[0], "attention_mask": attention_mask[0]}


def _frozen(
  config: config_lib.TextToImageConfig, tokenizer: text_lib.Tokenizer
) -> dict[str, Any]:
  """The empty caption, and the text encoder when it is not trained."""
  null_ids, null_mask = text_lib.tokenize_prompts(
    tokenizer, [""], max_sequence_length=config.max_sequence_length
  )
  frozen = {"null_ids": null_ids, "null_mask": null_mask}
  if not config.train_text_encoder:
    frozen["text_encoder"], found = components.load_text_encoder(
      config.text_encoder_path, dtype=jnp.dtype(config.dtype)
    )
    if found != config.text_encoder:
      ours, theirs = config.text_encoder.to_dict(), found.to_dict()
      differing = [
        f"{name} ({theirs[name]} there, {ours[name]} in the config)"
        for name in ours
        if theirs[name] != ours[name]
      ]
      raise ValueError(
        f"{config.text_encoder_path} holds another text encoder than "
        f"text_encoder describes: {', '.join(differing)}."
      )
  return frozen


def _check_vocabulary(config, tokenizer) -> None:
  if tokenizer.vocab_size > config.text_encoder.vocab_size:
    raise ValueError(
      f"text_encoder.vocab_size ({config.text_encoder.vocab_size}) is smaller "
      f"than the tokenizer's vocabulary ({tokenizer.vocab_size})."
    )
