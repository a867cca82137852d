"""What a pipeline compiles, for models and chips of true size."""

import functools

import jax
import jax.numpy as jnp
import pytest

from sana_jax import config as config_lib
from sana_jax import hardware
from sana_jax.models import tiling
from sana_jax.pipeline import footprint, memory
from sana_jax.plan import programs, sampling, topology

CONFIGS = (
  config_lib.Gemma2Config(),
  config_lib.sana_1600m(),
  config_lib.DCAEConfig(),
)


def test_sizes_must_be_whole_latents():
  with pytest.raises(ValueError, match="height 1000 and width 1024"):
    programs.make_work(*CONFIGS[1:], height=1000)


def test_abstract_models_have_the_published_sizes():
  models = programs.abstract_models(CONFIGS, jnp.bfloat16)
  count = [
    sum(leaf.size for leaf in jax.tree.leaves(model)) for model in models
  ]
  assert count == [2_614_341_888, 1_604_462_752, 312_250_275]
  assert footprint.nbytes(models) == 2 * sum(count)


@functools.cache
def records(side: int, stage: str):
  pytest.importorskip("libtpu")
  mesh = topology.one_chip("v5e:2x2")
  models = programs.abstract_models(CONFIGS, jnp.bfloat16)
  parts = map(footprint.make_part, CONFIGS, models)
  work = programs.make_work(*CONFIGS[1:], height=side, width=side)
  plan = memory.plan(
    footprint.Models(*parts, platform="tpu"),
    work,
    policy=memory.Policy(),
    tiling=tiling.square(512),
    available=hardware.CHIPS["v5e"].hbm_bytes,
  )
  found = programs.programs(CONFIGS, models, work, plan.decoding, 20)
  return [
    sampling.measure(program, mesh, plan, hardware.CHIPS["v5e"].hbm_bytes)
    for program in found
    if program.stage == stage
  ]


@pytest.mark.tpu_aot
@pytest.mark.parametrize("stage", memory.STAGES)
def test_predictions_for_a_tpu_are_neither_too_small_nor_half_too_large(stage):
  measured = records(1024, stage)
  working = max(record["working"] for record in measured)
  predicted = measured[0]["predicted"]
  weights = measured[0]["weights"]
  assert working <= predicted
  assert weights + predicted <= 1.5 * (weights + working)
  assert all(record["fits"] for record in measured)


def test_the_stages_of_a_pipeline_are_what_is_compiled():
  models = programs.abstract_models(CONFIGS, jnp.bfloat16)
  parts = map(footprint.make_part, CONFIGS, models)
  work = programs.make_work(*CONFIGS[1:], batch=2)
  plan = memory.plan(
    footprint.Models(*parts, platform="tpu"),
    work,
    policy=memory.Policy(),
    tiling=None,
    available=hardware.CHIPS["v5p"].hbm_bytes,
  )
  found = list(programs.programs(CONFIGS, models, work, plan.decoding, 20))
  assert [one.stage for one in found] == list(memory.STAGES)
  assert found[1].args[2].shape == (2, 32, 32, 32)
  pictures = jax.eval_shape(found[2].function, found[2].model, *found[2].args)
  assert pictures.shape == (2, 1024, 1024, 3)


def test_latents_of_another_autoencoder_are_refused():
  config = config_lib.TextToImageConfig(
    model=config_lib.SanaConfig(in_channels=4)
  )
  devices = topology.Topology("host:1", "v5e", tuple(jax.devices()[:1]), 1)
  with pytest.raises(ValueError, match="latents of 32 channels"):
    sampling.plan(config, devices)
