"""No program of a model has a grouped convolution.

On CPU they run on one core, and on TPU they make XLA gather the global batch.
"""

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from sana_jax.models import controlnet, dc_ae, sana
from tests import tiny

CONDITION = ((2, 4, 6, 4), (2,), (2, 5, 12))


def _denoise():
  config = tiny.transformer_config()
  return _abstract(sana.SanaTransformer, config), sana.SanaTransformer.__call__


def _control():
  model = _abstract(controlnet.SanaControlNet, tiny.controlnet_config())

  def run(model, latents, timestep, text):
    return model(latents, latents, timestep, text)

  return model, run


def _decode():
  config = tiny.autoencoder_config()
  return _abstract(dc_ae.DCAE, config), dc_ae.DCAE.decode


def _encode():
  config = tiny.autoencoder_config()
  return _abstract(dc_ae.DCAE, config), dc_ae.DCAE.encode


def _abstract(cls, config):
  return jax.eval_shape(lambda: cls.from_config(config, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize(
  ("program", "shapes"),
  [
    (_denoise, CONDITION),
    (_control, CONDITION),
    (_decode, ((1, 4, 4, 4),)),
    (_encode, ((1, 32, 32, 3),)),
  ],
)
def test_no_model_has_a_grouped_convolution(program, shapes, platform):
  model, function = program()
  args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  text = (
    jax.jit(function)
    .trace(model, *args)
    .lower(lowering_platforms=(platform,))
    .as_text()
  )
  groups = re.findall(r"feature_group_count = (\d+)", text)
  assert set(groups) <= {"1"}
  assert groups or "dot_general" in text
  # Depthwise convolutions are there, as what the platform has for them.
  assert ("tpu_custom_call" in text) == (platform == "tpu")
