"""The recipe that trains a SanaTransformer on latents of a fixed DCAE."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jaxtyping import Array, Bool, Float

from sana_jax import config as config_lib
from sana_jax import flops
from sana_jax import images as images_lib
from sana_jax import pipeline as pipeline_lib
from sana_jax import text as text_lib
from sana_jax.diffusion import flow, schedules
from sana_jax.models import dc_ae, gemma2, sana
from sana_jax.pipeline import training_run
from sana_jax.training import initial
from sana_jax.training import inputs as inputs_lib
from sana_jax.training import recipe as recipe_lib
from sana_jax.training import scalars as scalars_lib
from sana_jax.weights import components

# Of the noise levels that the loss is also reported for.
_NUM_BINS = 5


def make_recipe(
  config: config_lib.TextToImageConfig,
  workdir: epath.PathLike | None = None,
) -> recipe_lib.Recipe:
  """Loads what stays fixed, opens the data, and builds the rest.

  Noise needs nothing that is fixed, and nothing is made of what it trains.

  Args:
    workdir: of the run, where what is known of the data is kept; None: nowhere.
  """
  if config.data.synthetic:
    inputs = inputs_lib.from_synthetic(config)
    return _recipe(
      *(config, inputs, inputs.frozen),
      sample=None,
      export=None,
      compression=config.data.image_size // config.model.sample_size,
    )
  config = training_run.located(config)
  autoencoder, autoencoder_config = components.load_autoencoder(
    config.autoencoder
  )
  tokenizer = text_lib.Tokenizer.from_pretrained(config.tokenizer)
  _check_vocabulary(config, tokenizer)
  generation = training_run.generation_config(config)
  tokenize = functools.partial(_tokenize, tokenizer, generation)
  # Captions of models are often longer, and come again every epoch.
  quiet = functools.partial(tokenize, warn=False)
  if config.data.cache is not None:
    inputs = inputs_lib.from_cache(
      config, autoencoder_config, generation, quiet
    )
  elif config.data.places:
    inputs = inputs_lib.from_pictures(
      *(config, autoencoder, autoencoder_config, quiet, workdir)
    )
  else:
    inputs = inputs_lib.from_emoji(
      config, autoencoder, autoencoder_config, tokenize
    )
  pipe = None

  def updated_pipeline(params, frozen) -> pipeline_lib.SanaPipeline:
    # One object for the whole run: it keeps its compiled programs.
    nonlocal pipe
    models = {"text_encoder": frozen.get("text_encoder"), **params}
    if pipe is None:
      if models["text_encoder"] is None:
        models["text_encoder"] = _load_text_encoder(config)
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
    if models["text_encoder"] is not None:
      pipe.text_encoder = models["text_encoder"]
    return pipe

  def sample(params, frozen):
    output = updated_pipeline(params, frozen)(config.sample_prompts, seed=0)
    return images_lib.to_uint8(images_lib.grid(output.images))

  return _recipe(
    config,
    inputs,
    inputs.frozen | _frozen(config, tokenizer, inputs),
    sample=sample,
    export=lambda params, frozen, path: updated_pipeline(
      params, frozen
    ).save_pretrained(path),
    compression=autoencoder_config.spatial_compression,
  )


def _recipe(
  config: config_lib.TextToImageConfig,
  inputs: inputs_lib.Inputs,
  frozen: dict[str, Any],
  *,
  sample: Callable[[Any, Any], np.ndarray] | None,
  export: Callable[[Any, Any, epath.Path], None] | None,
  compression: int,
) -> recipe_lib.Recipe:
  return recipe_lib.Recipe(
    init=lambda key: init_params(config, key),
    param_axes={
      "transformer": sana.PARAM_AXES,
      "text_encoder": gemma2.PARAM_AXES,
      "autoencoder": dc_ae.PARAM_AXES,
    },
    frozen=frozen,
    loss_fn=functools.partial(
      flow_loss, config=config, condition=inputs.condition
    ),
    batches=inputs.batches,
    sample=sample,
    export=export,
    num_shapes=inputs.num_shapes,
    name_shape=lambda batch: "x".join(map(str, inputs.size_of(batch))),
    name_batch=inputs.name_batch,
    flops_per_image=lambda batch: flops.training(
      flops.forward(
        config.model,
        *inputs.size_of(batch),
        compression=compression,
        text_length=config.max_sequence_length,
      )
    ),
    initial=None
    if config.init_from is None
    else functools.partial(initial.prepare, config),
    ledger=inputs.ledger,
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
      config.model,
      rngs=nnx.Rngs(key_transformer),
      fp16_clamp=config.fp16_clamp,
      **build,
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
  condition: inputs_lib.ConditionFn = inputs_lib.tokens_to_conditions,
) -> tuple[Float[Array, ""], scalars_lib.Scalars]:
  """Computes the rectified-flow loss with caption dropout.

  Loss = mean || model(x_sigma, T, text) - (noise - latents) ||^2, where a
  dropped caption's text states are those of the empty caption. Tells the loss
  by noise level, too.

  Args:
    condition: what makes latents and text states of the batch.

  Source: SANA, arXiv:2410.10629, section 2.3.
  """
  key_drop, key_sigma, key_noise = jax.random.split(key, 3)
  given = condition(params, frozen, batch, config)
  latents = given.latents
  text, text_mask = drop_captions(key_drop, given, config.flow)
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
  target = flow.velocity(latents, noise)
  errors = flow.squared_error(prediction, target)
  return flow.loss(prediction, target), loss_by_sigma(errors, sigma)


def loss_by_sigma(
  errors: Float[Array, "b"], sigma: Float[Array, "b"]
) -> dict[str, scalars_lib.Ratio]:
  """Splits the samples' losses into fifths of the noise levels."""
  which = jnp.clip((_NUM_BINS * sigma).astype(jnp.int32), 0, _NUM_BINS - 1)
  ratios = {}
  for number in range(_NUM_BINS):
    low, high = number / _NUM_BINS, (number + 1) / _NUM_BINS
    inside = which == number
    ratios[f"loss/sigma_{low:.1f}_{high:.1f}"] = scalars_lib.Ratio(
      jnp.where(inside, errors, 0).sum(), inside.sum(dtype=jnp.float32)
    )
  return ratios


def drop_captions(
  key: jax.Array, given: inputs_lib.Conditions, config: config_lib.FlowConfig
) -> tuple[Float[Array, "b l d"], Bool[Array, "b l"]]:
  """Returns text states and mask, some captions replaced by the empty one."""
  text, mask = given.text, given.text_mask
  dropped = jax.random.bernoulli(key, config.caption_dropout, (text.shape[0],))
  text = jnp.where(dropped[:, None, None], given.null_text, text)
  if config.null_mask == "own":
    mask = jnp.where(dropped[:, None], given.null_text_mask, mask)
  return text, mask


def _tokenize(
  tokenizer: text_lib.Tokenizer,
  generation: pipeline_lib.GenerationConfig,
  captions: Sequence[str],
  *,
  warn: bool = True,
) -> dict[str, np.ndarray]:
  input_ids, attention_mask = text_lib.tokenize_prompts(
    tokenizer,
    captions,
    complex_human_instruction=generation.complex_human_instruction,
    max_sequence_length=generation.max_sequence_length,
    warn=warn,
  )
  return {"input_ids": input_ids, "attention_mask": attention_mask}


def _frozen(
  config: config_lib.TextToImageConfig,
  tokenizer: text_lib.Tokenizer,
  inputs: inputs_lib.Inputs,
) -> dict[str, Any]:
  """The empty caption, and the text encoder when it is not trained."""
  if not inputs.encodes_text:
    return {}
  null_ids, null_mask = text_lib.tokenize_prompts(
    tokenizer, [""], max_sequence_length=config.max_sequence_length
  )
  frozen = {"null_ids": null_ids, "null_mask": null_mask}
  if not config.train_text_encoder:
    frozen["text_encoder"] = _load_text_encoder(config)
  return frozen


def _load_text_encoder(config: config_lib.TextToImageConfig) -> gemma2.Gemma2:
  encoder, found = components.load_text_encoder(
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
  return encoder


def _check_vocabulary(config, tokenizer) -> None:
  if tokenizer.vocab_size > config.text_encoder.vocab_size:
    raise ValueError(
      f"text_encoder.vocab_size ({config.text_encoder.vocab_size}) is smaller "
      f"than the tokenizer's vocabulary ({tokenizer.vocab_size})."
    )
