"""The text-to-image recipe: its loss, written out, and what it trains."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax import text as text_lib
from sana_jax import tree
from sana_jax.data import loader
from sana_jax.diffusion import flow
from sana_jax.models import gemma2, sana
from sana_jax.pipeline import training_run
from sana_jax.training import inputs as inputs_lib
from sana_jax.training import text_to_image
from sana_jax.weights import components
from tests import tiny

CAPTIONS = ("a red apple", "a green cat on a table", "apple", "a cat")
SIZE = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """A directory with tokenizer/, text_encoder/ and vae/."""
  path = tmp_path_factory.mktemp("checkpoint")
  tiny.make_tokenizer(path / "made")
  pipe = tiny.make_pipeline(
    path / "made", autoencoder=tiny.autoencoder_config(4)
  )
  pipe.save_pretrained(path)
  return path


def make_config(checkpoint, **changes) -> config_lib.TextToImageConfig:
  tokenizer = text_lib.Tokenizer.from_pretrained(checkpoint / "tokenizer")
  values = {
    "model": tiny.transformer_config(),
    "text_encoder": tiny.text_encoder_config(tokenizer.vocab_size),
    "train_text_encoder": True,
    "autoencoder": str(checkpoint / "vae"),
    "tokenizer": str(checkpoint / "tokenizer"),
    "max_sequence_length": tiny.LENGTH,
    "sample_prompts": ("a cat",),
    "sample_steps": 2,
    "dtype": "float32",
    "remat": "none",
  }
  config = config_lib.TextToImageConfig(**values | changes)
  config.data.split = "heldout"
  config.flow.shift = 2.0
  return config


@pytest.fixture(scope="module")
def models(checkpoint):
  config = make_config(checkpoint)
  builds = {
    "transformer": (sana.SanaTransformer, config.model),
    "text_encoder": (gemma2.Gemma2, config.text_encoder),
  }
  return {
    name: tiny.random_model(
      lambda: cls.from_config(part, rngs=nnx.Rngs(0)),  # noqa: B023
      seed,
    )
    for seed, (name, (cls, part)) in enumerate(builds.items())
  }


@pytest.fixture(scope="module")
def inputs(checkpoint):
  """A batch, the frozen null caption, and the tokenizer."""
  tokenizer = text_lib.Tokenizer.from_pretrained(checkpoint / "tokenizer")

  def tokens(prompts):
    ids, mask = text_lib.tokenize_prompts(
      tokenizer, prompts, max_sequence_length=tiny.LENGTH
    )
    return jnp.asarray(ids), jnp.asarray(mask)

  shape = (len(CAPTIONS), SIZE, SIZE, 4)
  latents = np.random.default_rng(3).normal(size=shape).astype(np.float32)
  ids, mask = tokens(CAPTIONS)
  batch = {
    "latents": jnp.asarray(latents),
    "input_ids": ids,
    "attention_mask": mask,
  }
  null_ids, null_mask = tokens([""])
  return batch, {"null_ids": null_ids, "null_mask": null_mask}, tokenizer


def written_out(models, inputs, key, config) -> float:
  """The loss of section 2.3 of the paper, one sample at a time."""
  batch, _, tokenizer = inputs
  key_drop, key_sigma, key_noise = jax.random.split(key, 3)
  count = len(CAPTIONS)
  dropped = jax.random.bernoulli(
    key_drop, config.flow.caption_dropout, (count,)
  )
  sigmas, timesteps = flow.sample_sigma(key_sigma, count, shift=2.0)
  noises = jax.random.normal(key_noise, batch["latents"].shape)
  losses = []
  for i, caption in enumerate(CAPTIONS):
    states, mask = text_lib.encode_prompts(
      models["text_encoder"],
      tokenizer,
      ["" if dropped[i] else caption],
      max_sequence_length=tiny.LENGTH,
    )
    if dropped[i] and config.flow.null_mask == "caption":
      mask = batch["attention_mask"][i : i + 1].astype(bool)
    clean, noise = batch["latents"][i], np.asarray(noises[i])
    noisy = (1 - sigmas[i]) * clean + sigmas[i] * noise
    prediction = models["transformer"](
      noisy[None], timesteps[i : i + 1], states, mask
    )
    losses.append(np.square(np.asarray(prediction[0]) - noise + clean).mean())
  return float(np.mean(losses))


@pytest.mark.parametrize("null_mask", ["caption", "own"])
@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
def test_the_loss_is_that_of_the_definition(
  checkpoint, models, inputs, null_mask, dropout
):
  config = make_config(checkpoint)
  config.flow.null_mask = null_mask
  config.flow.caption_dropout = dropout
  key = jax.random.key(4)
  loss, _ = compute_loss(models, inputs[1], key, inputs[0], config)
  # Batched and single products are summed in different orders.
  np.testing.assert_allclose(
    loss, written_out(models, inputs, key, config), rtol=1e-5
  )


def test_the_masks_of_dropped_captions_differ(checkpoint, models, inputs):
  losses = []
  for null_mask in ("caption", "own"):
    config = make_config(checkpoint)
    config.flow.null_mask = null_mask
    config.flow.caption_dropout = 1.0
    loss, _ = compute_loss(
      models, inputs[1], jax.random.key(4), inputs[0], config
    )
    losses.append(float(loss))
  assert abs(losses[0] - losses[1]) > 1e-4


def test_a_dropped_caption_has_no_influence(checkpoint, models, inputs):
  config = make_config(checkpoint)
  config.flow.null_mask = "own"
  config.flow.caption_dropout = 1.0
  batch, null, _ = inputs
  other = dict(batch, input_ids=batch["input_ids"][::-1])
  other["attention_mask"] = batch["attention_mask"][::-1]
  losses = [
    compute_loss(models, null, jax.random.key(4), b, config)[0]
    for b in (batch, other)
  ]
  np.testing.assert_array_equal(*losses)


def test_the_loss_is_told_by_noise_level(checkpoint, models, inputs):
  config = make_config(checkpoint)
  # Spread over the levels, so that several fifths have samples.
  config.flow.logit_std = 3.0
  loss, told = compute_loss(
    models, inputs[1], jax.random.key(4), inputs[0], config
  )
  assert len([r for r in told.values() if r.count > 0]) > 1
  assert set(told) == {
    *("loss/sigma_0.0_0.2", "loss/sigma_0.2_0.4", "loss/sigma_0.4_0.6"),
    *("loss/sigma_0.6_0.8", "loss/sigma_0.8_1.0"),
  }
  count = sum(float(ratio.count) for ratio in told.values())
  total = sum(float(ratio.total) for ratio in told.values())
  assert count == len(inputs[0]["input_ids"])
  np.testing.assert_allclose(total / count, loss, rtol=1e-5)


def test_a_sample_counts_for_the_fifth_its_noise_level_is_in():
  told = text_to_image.loss_by_sigma(
    jnp.array([1.0, 2.0, 4.0, 8.0]), jnp.array([0.0, 0.19, 0.65, 1.0])
  )
  means = {
    name.removeprefix("loss/sigma_"): (float(r.total), float(r.count))
    for name, r in told.items()
  }
  assert means == {
    "0.0_0.2": (3, 2),
    "0.2_0.4": (0, 0),
    "0.4_0.6": (0, 0),
    "0.6_0.8": (4, 1),
    "0.8_1.0": (8, 1),
  }


def compute_loss(models, frozen, key, batch, config):
  loss = functools.partial(text_to_image.flow_loss, config=config)
  return jax.jit(loss)(models, frozen, key, batch)


def norms_of_gradient(models, frozen, inputs, config) -> dict[str, float]:
  def loss(params):
    return text_to_image.flow_loss(
      params, inputs[1] | frozen, jax.random.key(1), inputs[0], config
    )[0]

  gradient = jax.jit(jax.grad(loss))(models)
  return {name: float(optax.tree.norm(g)) for name, g in gradient.items()}


@pytest.mark.slow
def test_the_gradient_reaches_the_text_encoder_when_it_is_trained(
  checkpoint, models, inputs
):
  config = make_config(checkpoint)
  norms = norms_of_gradient(models, {}, inputs, config)
  assert norms["transformer"] > 1e-3
  assert norms["text_encoder"] > 1e-3
  recipe = text_to_image.make_recipe(config)
  assert set(jax.eval_shape(recipe.init, jax.random.key(0))) == {
    "transformer",
    "text_encoder",
  }
  assert set(recipe.frozen) == {"null_ids", "null_mask"}


def test_a_pretrained_text_encoder_is_frozen(checkpoint, models, inputs):
  path = str(checkpoint / "text_encoder")
  config = make_config(
    checkpoint, train_text_encoder=False, text_encoder_path=path
  )
  recipe = text_to_image.make_recipe(config)
  assert set(jax.eval_shape(recipe.init, jax.random.key(0))) == {"transformer"}
  encoder = recipe.frozen["text_encoder"]
  trained = {"transformer": models["transformer"]}
  frozen = {"text_encoder": encoder}
  assert set(norms_of_gradient(trained, frozen, inputs, config)) == {
    "transformer"
  }


def test_another_pretrained_text_encoder_is_refused(checkpoint):
  config = make_config(
    checkpoint,
    train_text_encoder=False,
    text_encoder_path=str(checkpoint / "text_encoder"),
  )
  config.text_encoder = dataclasses.replace(
    config.text_encoder, rope_theta=500.0
  )
  with pytest.raises(ValueError, match=r"rope_theta \(10000.0 there, 500.0 in"):
    text_to_image.make_recipe(config)


def test_what_a_checkpoint_holds_does_not_depend_on_the_compute_type(
  checkpoint,
):
  """So a run may go on with another."""
  held = []
  for dtype in ("float32", "bfloat16"):
    config = make_config(checkpoint, dtype=dtype)
    init = functools.partial(text_to_image.init_params, config)
    params = jax.eval_shape(init, jax.random.key(0))
    held.append(
      [
        (name, leaf.shape, leaf.dtype)
        for name, leaf in zip(
          tree.leaf_names(params), jax.tree.leaves(params), strict=True
        )
      ]
    )
  assert held[0] == held[1]


def test_a_vocabulary_that_is_too_small_is_refused(checkpoint):
  config = make_config(checkpoint)
  config.text_encoder = dataclasses.replace(config.text_encoder, vocab_size=99)
  with pytest.raises(ValueError, match=r"vocab_size \(99\) is smaller than"):
    text_to_image.make_recipe(config)


def test_examples_hold_scaled_latents_and_tokens(checkpoint):
  config = make_config(checkpoint, max_sequence_length=48, batch_size=80)
  recipe = text_to_image.make_recipe(config)
  batch = next(iter(recipe.batches(loader.Host(), 0)))
  assert batch["latents"].shape == (80, 8, 8, 4)
  assert batch["input_ids"].shape == (80, 48)
  autoencoder, found = components.load_autoencoder(config.autoencoder)
  latents = inputs_lib.encode_images(autoencoder, config.data, batch_size=32)
  assert latents.shape == (80, 8, 8, 4)
  np.testing.assert_allclose(
    np.sort(batch["latents"].std(axis=(1, 2, 3))),
    np.sort(found.scaling_factor * latents.std(axis=(1, 2, 3))),
    rtol=1e-5,
  )


def test_the_instruction_is_put_in_front_when_it_is_wanted(checkpoint):
  plain = training_run.generation_config(make_config(checkpoint))
  assert plain.complex_human_instruction is None
  config = make_config(checkpoint, use_complex_human_instruction=True)
  with_it = training_run.generation_config(config)
  instruction = text_lib.default_instruction()
  assert with_it.complex_human_instruction == instruction
