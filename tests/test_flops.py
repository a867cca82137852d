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


def test_the_published_model_needs_three_teraflops():
  """2.967 by hand, and counted in diffusers with torch."""
  count = flops.forward(config_lib.sana_1600m(), 1024, 1024)
  assert count == pytest.approx(2.967e12, rel=2e-3)
  assert flops.training(count) == 3 * count
  assert flops.training(count, remat="full") == 4 * count
