"""Counted operations against XLA's own count."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax import flops
from sana_jax.models import sana


def lowered(config, height, width, text_length):
  """What XLA counts in one evaluation, nothing of which is compiled."""
  model = jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(
      config, scan=False, rngs=nnx.Rngs(0)
    )
  )
  shape = jax.ShapeDtypeStruct
  latents = (1, height // 32, width // 32, config.in_channels)
  return jax.jit(lambda model, *args: model(*args)).lower(
    model,
    shape(latents, jnp.float32),
    shape((1,), jnp.float32),
    shape((1, text_length, config.caption_channels), jnp.float32),
    shape((1, text_length), bool),
  )


@pytest.mark.parametrize(
  ("make", "size", "text_length"),
  [
    (config_lib.sana_600m, (1024, 1024), 300),
    (config_lib.sana_600m, (832, 1216), 77),
    (config_lib.sana_1600m, (512, 512), 300),
  ],
)
def test_operations_are_those_xla_counts(make, size, text_length):
  config = make()
  config.num_layers = 2
  ours = flops.forward(config, *size, text_length=text_length)
  theirs = lowered(config, *size, text_length).cost_analysis()["flops"]
  # XLA counts norms, activations and shifted sums too.
  assert ours == pytest.approx(theirs, rel=0.03)
  assert ours < theirs


@pytest.mark.parametrize(("side", "share"), [(1024, 0.97), (512, 0.87)])
@pytest.mark.parametrize("make", [config_lib.sana_600m, config_lib.sana_1600m])
def test_a_step_on_an_encoded_text_is_spared_its_part(make, side, share):
  # At full depth: the caption's projection is more of a shallow model.
  config = make()
  model = jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(
      config, scan=False, rngs=nnx.Rngs(0)
    )
  )
  shape = jax.ShapeDtypeStruct
  text = jax.eval_shape(
    lambda model, text: model.encode_text(text),
    model,
    shape((1, 300, config.caption_channels), jnp.float32),
  )
  latents = (1, side // 32, side // 32, config.in_channels)
  step = jax.jit(lambda model, *args: model(*args)).lower(
    model,
    shape(latents, jnp.float32),
    shape((1,), jnp.float32),
    text,
    shape((1, 300), bool),
  )
  count = step.cost_analysis()["flops"]
  assert count <= share * flops.forward(config, side, side)


def test_the_published_model_needs_three_teraflops():
  """2.967 by hand, and counted in diffusers with torch."""
  count = flops.forward(config_lib.sana_1600m(), 1024, 1024)
  assert count == pytest.approx(2.967e12, rel=2e-3)
  assert flops.training(count) == 3 * count
  assert flops.training(count, remat="full") == 4 * count
