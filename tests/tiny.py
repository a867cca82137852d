"""A complete pipeline with random weights, small enough for a test."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sana_jax import config as config_lib
from sana_jax import pipeline as pipeline_lib
from sana_jax import text, tree
from sana_jax.data import tokenizer_training
from sana_jax.diffusion import schedules
from sana_jax.models import controlnet as controlnet_lib
from sana_jax.models import dc_ae, gemma2, sana

CAPTIONS = ("a red apple", "a green cat on a table", "blurry, low quality")
INSTRUCTION = ("Describe the picture:", "Prompt: ")
LENGTH = 12


def transformer_config(**changes) -> config_lib.SanaConfig:
  values = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 8,
    "cross_attention_dim": 16,
    "caption_channels": 12,
    "sample_size": 8,
    "qk_norm": "rms_norm_across_heads",
  }
  return config_lib.SanaConfig(**values | changes)


def controlnet_config() -> config_lib.SanaControlNetConfig:
  """Fits `transformer_config`."""
  values = transformer_config().to_dict() | {"num_layers": 1}
  return config_lib.from_dict(config_lib.SanaControlNetConfig, values)


def autoencoder_config(stages: int = 3) -> config_lib.DCAEConfig:
  kinds = ("ResBlock",) * (stages - 1) + ("EfficientViTBlock",)
  scales = ((),) * (stages - 1) + ((5,),)
  return config_lib.DCAEConfig(
    latent_channels=4,
    attention_head_dim=4,
    encoder_block_types=kinds,
    decoder_block_types=kinds,
    encoder_block_out_channels=(4,) * (stages - 1) + (8,),
    decoder_block_out_channels=(4,) * (stages - 1) + (8,),
    encoder_layers_per_block=(1,) * stages,
    decoder_layers_per_block=(1,) * stages,
    encoder_qkv_multiscales=scales,
    decoder_qkv_multiscales=scales,
    scaling_factor=0.4,
  )


def text_encoder_config(vocab_size: int) -> config_lib.Gemma2Config:
  return config_lib.Gemma2Config(
    vocab_size=vocab_size,
    hidden_size=12,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    query_pre_attn_scalar=8.0,
    sliding_window=6,
  )


def make_tokenizer(directory) -> None:
  tokenizer_training.train_tokenizer(CAPTIONS, 310, directory)


def random_model(build, seed: int):
  """Draws every parameter: nothing is zero, so nothing goes unnoticed."""
  rng = np.random.default_rng(seed)

  def draw(name, leaf):
    values = rng.normal(size=leaf.shape).astype(np.float32)
    # Variances must be positive, and deep products must stay in range.
    values = np.abs(values) + 0.5 if "var" in name else 0.3 * values
    return jnp.asarray(values)

  return tree.map_with_names(draw, jax.eval_shape(build))


def make_pipeline(
  tokenizer_directory,
  *,
  solver=None,
  transformer=None,
  autoencoder=None,
  controlnet=False,
  devices=None,
) -> pipeline_lib.SanaPipeline:
  """Builds a pipeline; Sprint when the solver is `schedules.SCM`."""
  solver = solver or schedules.FlowDPMSolver()
  sprint = isinstance(solver, schedules.SCM)
  tokenizer = text.Tokenizer.from_pretrained(tokenizer_directory)
  configs = {
    "text_encoder": text_encoder_config(tokenizer.vocab_size),
    "transformer": transformer or transformer_config(guidance_embeds=sprint),
    "autoencoder": autoencoder or autoencoder_config(),
  }
  if controlnet:
    configs["controlnet"] = controlnet_config()
  classes = {
    "text_encoder": gemma2.Gemma2,
    "transformer": sana.SanaTransformer,
    "autoencoder": dc_ae.DCAE,
    "controlnet": controlnet_lib.SanaControlNet,
  }
  models = {
    name: random_model(
      lambda: classes[name].from_config(  # noqa: B023
        configs[name],  # noqa: B023
        rngs=nnx.Rngs(0),
      ),
      seed,
    )
    for seed, name in enumerate(configs)
  }
  defaults = (
    pipeline_lib.GenerationConfig.sprint()
    if sprint
    else pipeline_lib.GenerationConfig(num_inference_steps=3)
  )
  defaults.max_sequence_length = LENGTH
  defaults.complex_human_instruction = INSTRUCTION
  return pipeline_lib.SanaPipeline(
    **models,
    **{f"{name}_config": config for name, config in configs.items()},
    tokenizer=tokenizer,
    tokenizer_directory=tokenizer_directory,
    solver=solver,
    generation_config=defaults,
    devices=devices or jax.devices()[:1],
  )
