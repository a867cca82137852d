"""The configs of the published stages say what was published, and run."""

import importlib

import jax
import jax.numpy as jnp
import pytest

from sana_jax import config as config_lib
from sana_jax.training import inputs, text_to_image

# Source: the training configurations of github.com/NVlabs/Sana: pixels, latent
# grid, width, blocks, flow shift, optimiser, base learning rate.
PUBLISHED = {
  "sana_600m_512": (512, 16, 1152, 28, 3.0, "came", 1e-4),
  "sana_600m_1024": (1024, 32, 1152, 28, 4.0, "came", 1e-4),
  "sana_1600m_512": (512, 16, 2240, 20, 3.0, "came", 1e-4),
  "sana_1600m_1024": (1024, 32, 2240, 20, 3.0, "came", 1e-4),
  "sana_1600m_2k": (2048, 64, 2240, 20, 3.0, "came", 1e-4),
  "sana_1600m_4k": (4096, 128, 2240, 20, 6.0, "came", 1e-4),
  "sana15_1600m_1024": (1024, 32, 2240, 20, 3.0, "came", 2e-5),
  "sana15_4800m_1024": (1024, 32, 2240, 60, 3.0, "came_8bit", 2e-5),
}


def get(name: str, *hardware: str) -> config_lib.TextToImageConfig:
  return importlib.import_module(f"configs.{name}").get_config(*hardware)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_stage_has_the_published_hyper_parameters(name):
  config = get(name)
  assert PUBLISHED[name] == (
    config.data.image_size,
    config.model.sample_size,
    config.model.width,
    config.model.num_layers,
    config.flow.shift,
    config.optim.name,
    config.optim.peak_lr,
  )
  assert config.model.caption_channels == 2304
  assert config.model.mlp_ratio == 2.5
  scale = {"sana_1600m_2k": 1.0, "sana_1600m_4k": 2.0}.get(name)
  assert config.model.interpolation_scale == scale
  norms = "rms_norm_across_heads" if name.startswith("sana15") else None
  assert config.model.qk_norm == norms
  # The same for all.
  optim, data, flow = config.optim, config.data, config.flow
  assert (optim.batch_scaling, optim.schedule) == ("sqrt", "constant")
  assert (optim.warmup_steps, optim.clip_norm) == (2000, 0.1)
  assert (optim.b1, optim.b2, optim.came_b3) == (0.9, 0.999, 0.9999)
  assert optim.weight_decay == 0
  assert data.caption_method == "clip_power"
  assert (data.caption_temperature, data.caption_threshold) == (0.1, 25.0)
  assert (data.buckets, data.max_buckets) == ("aspect", 40)
  assert (flow.logit_mean, flow.logit_std) == (0.0, 1.0)
  assert (flow.caption_dropout, flow.null_mask) == (0.1, "caption")
  assert config.max_sequence_length == 300
  assert config.use_complex_human_instruction
  assert (config.dtype, config.remat, config.seed) == ("bfloat16", "full", 1)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
  "data", [{"cache": "cache"}, {"path": "pictures"}, {"synthetic": True}]
)
def test_a_stage_is_valid_with_any_data(name, data):
  config = get(name, "v5p-64")
  for field, value in data.items():
    setattr(config.data, field, value)
  config.freeze()


def test_a_stage_without_data_says_what_to_give():
  with pytest.raises(
    ValueError, match=r"^no data given: set data\.cache \(docs/data\.md\)"
  ):
    get("sana_1600m_1024").freeze()


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_loss_of_a_stage_takes_its_batches(name):
  config = get(name)
  grid = config.model.sample_size
  params = jax.eval_shape(
    lambda key: text_to_image.init_params(config, key), jax.random.key(0)
  )
  loss, _ = jax.eval_shape(
    lambda *args: text_to_image.flow_loss(
      *args, config, condition=inputs.cached_conditions
    ),
    *(params, inputs.abstract_frozen(config), jax.random.key(0)),
    inputs.abstract_batch(config, grid, grid),
  )
  assert (loss.shape, loss.dtype) == ((), jnp.float32)


def test_the_table_above_is_of_all_stages():
  root = importlib.resources.files("configs")
  names = {path.stem for path in root.iterdir() if path.suffix == ".py"}
  assert {name for name in names if name.startswith("sana")} == set(PUBLISHED)
