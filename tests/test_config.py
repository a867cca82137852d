"""Configs: typos are errors, values are checked, dicts become configs."""

import json

import pytest

from configs import folder
from sana_jax import config as config_lib
from sana_jax.config import near

TRAIN = config_lib.TrainConfig
PRESETS = (
  config_lib.sana_600m,
  config_lib.sana_1600m,
  config_lib.sana_1600m_2k,
  config_lib.sana_1600m_4k,
  config_lib.sana15_1600m,
  config_lib.sana15_4800m,
  config_lib.sana_sprint_600m,
  config_lib.sana_sprint_1600m,
  config_lib.dc_ae_lite,
  config_lib.DCAEConfig,
  config_lib.Gemma2Config,
)


def text_to_image(**changes) -> config_lib.TextToImageConfig:
  values = {
    "autoencoder": "vae",
    "tokenizer": "tokenizer",
    "text_encoder_path": "text_encoder",
    "sample_prompts": ("a cat",),
  }
  return config_lib.TextToImageConfig(**values | changes)


def test_a_misspelled_field_is_an_error_that_lists_the_fields():
  config = TRAIN()
  with pytest.raises(
    AttributeError,
    match="'batchsize'. Did you mean 'batch_size'.* It has: seed",
  ):
    config.batchsize = 8
  with pytest.raises(AttributeError, match="OptimConfig has no field 'lr'"):
    config.optim.lr = 1e-3


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("batchsize", ["batch_size"]),
    ("peak_lr", ["optim.peak_lr"]),
    ("lr", ["optim.peak_lr"]),
    ("optim.peek_lr", ["optim.peak_lr", "optim.name"]),
    ("nothing_like_it", []),
  ],
)
def test_a_name_is_near_those_with_its_letters_or_its_last_part(name, expected):
  names = ["optim", "optim.name", "optim.peak_lr", "batch_size"]
  assert near.find(name, names) == expected


def test_a_frozen_config_cannot_be_changed_anywhere():
  config = TRAIN()
  config.freeze()
  with pytest.raises(AttributeError, match="TrainConfig.seed.*frozen"):
    config.seed = 1
  with pytest.raises(AttributeError, match="OptimConfig.peak_lr.*frozen"):
    config.optim.peak_lr = 1.0
  config.freeze()  # freezing twice is no error


def test_configs_do_not_share_their_parts():
  one, other = TRAIN(), TRAIN()
  one.optim.peak_lr = 5.0
  one.mesh["data"] = 2
  assert other.optim.peak_lr != 5.0
  assert other.mesh["data"] == -1


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_valid_and_survive_json(preset):
  config = preset()
  config.freeze()
  values = json.loads(config.to_json())
  assert config_lib.from_dict(type(config), values, strict=True) == config


def test_from_dict_ignores_unknown_keys_unless_strict():
  values = {"num_layers": 3, "_class_name": "SanaTransformer2DModel"}
  config = config_lib.from_dict(config_lib.SanaConfig, values)
  assert config.num_layers == 3
  assert config.attention_head_dim == 32
  with pytest.raises(ValueError, match=r"SanaConfig has no fields \['_class"):
    config_lib.from_dict(config_lib.SanaConfig, values, strict=True)


def test_lists_become_tuples_at_every_depth():
  config = config_lib.from_dict(
    config_lib.DCAEConfig, {"encoder_qkv_multiscales": [[], [5, 3]]}
  )
  assert config.encoder_qkv_multiscales == ((), (5, 3))


def pictures(**changes) -> config_lib.DataConfig:
  return config_lib.DataConfig(**{"path": "pictures"} | changes)


def test_sources_in_a_tuple_survive_json_and_are_frozen():
  sources = (
    config_lib.SourceConfig(path="a", weight=0.5),
    config_lib.SourceConfig(path="b", kind="folder", split="train"),
  )
  config = text_to_image(data=config_lib.DataConfig(sources=sources))
  values = json.loads(config.to_json())
  again = config_lib.from_dict(type(config), values, strict=True)
  assert again == config
  assert again.data.places == sources
  again.freeze()
  with pytest.raises(AttributeError, match="SourceConfig.weight cannot be set"):
    again.data.sources[1].weight = 2.0
  values["data"]["sources"][0]["wieght"] = 1
  with pytest.raises(
    ValueError, match=r"SourceConfig has no fields \['wieght'"
  ):
    config_lib.from_dict(type(config), values, strict=True)


def test_one_path_is_one_source():
  places = pictures().places
  assert places == (config_lib.SourceConfig(path="pictures"),)
  assert config_lib.DataConfig().places == ()


def test_a_complete_training_config_is_valid():
  TRAIN().freeze()
  TRAIN(data=pictures(buckets="aspect", caption_method="random")).freeze()
  TRAIN(
    data=pictures(caption_method="clip_power", caption_threshold=25.0)
  ).freeze()
  TRAIN(data=config_lib.DataConfig(cache="c", caption_method="random")).freeze()
  text_to_image().freeze()
  config_lib.AutoencoderConfig().freeze()


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (
      config_lib.CheckpointConfig(every=0, keep=0, keep_best=-1),
      r"every must be at least 1, got 0; .*keep must .*keep_best must .*got -1",
    ),
    (
      config_lib.CheckpointConfig(every=4, keep_every=6),
      r"checkpoint.keep_every \(6\) must be a multiple of .*every \(4\)",
    ),
    (
      config_lib.CheckpointConfig(best_mode="lowest"),
      "best_mode must be 'min' or 'max', got 'lowest'",
    ),
    (
      config_lib.AnomalyConfig(rollback_after=0, spike_window=3),
      "rollback_after must be at least 1, got 0; .*spike_window .* 10, got 3",
    ),
    (
      config_lib.AnomalyConfig(spike_factor=0.5),
      "spike_factor must be 0 or greater than 1, got 0.5",
    ),
    (
      config_lib.SanaConfig(num_cross_attention_heads=19),
      r"\(2128\).*must equal the width.*\(2240\)",
    ),
    (
      config_lib.SanaConfig(cross_attention_dim=1152),
      r"cross_attention_dim \(1152\) must equal the width \(2240\)",
    ),
    (config_lib.SanaConfig(qk_norm="layer"), "model.qk_norm .*got 'layer'"),
    (
      config_lib.Gemma2Config(num_key_value_heads=3),
      r"num_attention_heads \(8\) must be a multiple .*\(3\)",
    ),
    (config_lib.FlowConfig(shift=0.0), "flow.shift must be > 0, got 0.0"),
    (
      config_lib.FlowConfig(caption_dropout=1.5),
      r"flow.caption_dropout must be in \[0, 1\], got 1.5",
    ),
    (config_lib.FlowConfig(null_mask="none"), "flow.null_mask .*got 'none'"),
    (config_lib.OptimConfig(schedule="linear"), "optim.schedule.*'linear'"),
    (config_lib.OptimConfig(peak_lr=0.0), "optim.peak_lr .*positive.*0.0"),
    (
      config_lib.OptimConfig(clip_norm=float("inf")),
      "optim.clip_norm must be a positive number, got inf",
    ),
    (config_lib.OptimConfig(warmup_steps=-1), "optim.warmup_steps .*-1"),
    (config_lib.OptimConfig(weight_decay=-0.1), "optim.weight_decay .*-0.1"),
    (config_lib.OptimConfig(b2=1.0), r"optim.b2 must be in \[0, 1\), got 1.0"),
    (config_lib.OptimConfig(final_lr_ratio=2.0), "final_lr_ratio .*got 2.0"),
    (config_lib.OptimConfig(name="sgd"), "optim.name .*'came_8bit'.*'sgd'"),
    (
      config_lib.OptimConfig(batch_scaling="log"),
      "optim.batch_scaling .*'sqrt'.*'log'",
    ),
    (
      config_lib.OptimConfig(moment_dtype="int8"),
      "optim.moment_dtype .*'bfloat16'.*'int8'",
    ),
    (
      config_lib.OptimConfig(came_b3=0.99),
      r"optim.came_b3 \(0.99\) has no effect with optim.name='adamw'",
    ),
    (
      config_lib.OptimConfig(name="lion", b2=0.95, eps=1e-6),
      r"optim.b2 \(0.95\) has no effect .*optim.eps \(1e-06\) has no effect",
    ),
    (
      config_lib.OptimConfig(name="came", moment_dtype="bfloat16"),
      "optim.moment_dtype .*no effect with optim.name='came'",
    ),
    (
      config_lib.OptimConfig(final_lr_ratio=0.1),
      "optim.final_lr_ratio .*no effect with optim.schedule='constant'",
    ),
    (
      config_lib.OptimConfig(weight_decay=0.0, weight_decay_exclude=("bias",)),
      "weight_decay_exclude has no effect without a weight_decay",
    ),
    (
      config_lib.OptimConfig(schedule="wsd"),
      "optim.decay_steps must be at least 1 .*got 0",
    ),
    (
      config_lib.OptimConfig(accumulation=0),
      "optim.accumulation must be at least 1, got 0",
    ),
    (
      config_lib.OptimConfig(frozen=("blocks/(q",)),
      r"optim.frozen has 'blocks/\(q', no regular expression",
    ),
    (
      config_lib.OptimConfig(lr_multipliers={"head": 0.0}),
      r"lr_multipliers\['head'\] must be a positive .*optim.frozen",
    ),
    (
      TRAIN(batch_size=6, optim=config_lib.OptimConfig(accumulation=4)),
      r"batch_size \(6\) must be a multiple of optim.accumulation \(4\)",
    ),
    (TRAIN(num_steps=0), "num_steps must be positive, got 0"),
    (TRAIN(sample_every=0), "sample_every must be positive, got 0"),
    (TRAIN(mesh={"model": 8}), "mesh must have no axes but .*{'model': 8}"),
    (TRAIN(mesh={"data": -1, "fsdp": -1}), "at most one -1, got"),
    (TRAIN(mesh={"data": 0}), "mesh sizes must be positive.*{'data': 0}"),
    (TRAIN(remat="some"), "remat must be .*got 'some'"),
    (TRAIN(dtype="float16"), "dtype must be .*got 'float16'"),
    (TRAIN(ema_decay=1.0), r"ema_decay must be in \[0, 1\), got 1.0"),
    (
      TRAIN(optim=config_lib.OptimConfig(eps=0.0)),
      "optim.eps must be a positive number",
    ),
    (
      text_to_image(text_encoder=config_lib.Gemma2Config(hidden_size=64)),
      r"caption_channels \(2304\) must equal text_encoder.hidden_size \(64\)",
    ),
    (
      TRAIN(data=pictures(cache="c")),
      r"data.cache and data.synthetic, got \['path', 'cache'\]",
    ),
    (
      config_lib.DataConfig(
        sources=(
          config_lib.SourceConfig(path="a", weight=0.0),
          config_lib.SourceConfig(weight=float("nan")),
        )
      ),
      r"(?s)sources\[0\].weight .* 0.0.*sources\[1\].path is.*weight .* nan",
    ),
    (
      pictures(keyword_probability=0.5, split="heldout"),
      "data.split, data.keyword_probability have no effect on data.path: leave",
    ),
    (
      config_lib.DataConfig(crop="random", caption_method="random"),
      r"^no data given: set data.cache \(docs/data.md\), .*bundled emoji, on "
      "which data.crop, data.caption_method have no effect",
    ),
    (
      config_lib.DataConfig(cache="c", random_flip=True),
      "data.random_flip has no effect on data.cache",
    ),
    (
      pictures(caption_threshold=25.0, caption_proportions={"a": 1.0}),
      "(?s)data.caption_threshold has no effect on data.caption_method='first'"
      ".*set the method to .*clip_power.*caption_proportions has no effect",
    ),
    (
      config_lib.DataConfig(
        cache="c", caption_temperature=2.0, caption_method="random"
      ),
      "data.caption_temperature has no effect on data.caption_method='random'",
    ),
    (
      pictures(caption_method="proportion", caption_proportions={"a": 0.0}),
      "data.caption_proportions must give .* a positive weight, got {'a': 0.0}",
    ),
    (folder.get_config(), "no data are given: set data.path=DIR .*data.cache"),
    (pictures(resample="box"), "data.resample must be one of .*got 'box'"),
    (pictures(buckets="round"), "data.buckets must be one of .*got 'round'"),
    (pictures(crop="left"), "data.crop must be one of .*got 'left'"),
    (pictures(caption_method="best"), "data.caption_method .*got 'best'"),
    (pictures(max_buckets=0), "data.max_buckets must be at least 1, got 0"),
    (
      pictures(min_clip_score=-1.0),
      "data.min_clip_score must be at least 0, got -1.0",
    ),
    (pictures(num_workers=-1), "data.num_workers must be at least 0, got -1"),
    (
      pictures(caption_temperature=0.0),
      "data.caption_temperature must be a positive number, got 0.0",
    ),
    (
      config_lib.AutoencoderConfig(data=pictures()),
      "an autoencoder is trained on emoji; leave out data.path",
    ),
    (text_to_image(text_encoder_path=None), "set train_text_encoder=True"),
    (text_to_image(autoencoder=""), "autoencoder is empty"),
    (text_to_image(tokenizer=""), "tokenizer is empty"),
    (text_to_image(sample_prompts=()), "sample_prompts is empty"),
  ],
)
def test_values_that_cannot_be_are_named(config, message):
  with pytest.raises(ValueError, match=message):
    config.freeze()
