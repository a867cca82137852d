"""Text to 64-pixel emoji: the model that ships, 5.9M trained parameters."""

from sana_jax import config as config_lib

_MODEL = "sana_jax/assets/emoji_model"


def get_config() -> config_lib.TextToImageConfig:
  """Returns the run that made the model that ships (see its card)."""
  config = config_lib.TextToImageConfig()
  config.autoencoder = f"{_MODEL}/vae"
  config.tokenizer = f"{_MODEL}/tokenizer"
  config.model = config_lib.SanaConfig(
    num_attention_heads=8,
    attention_head_dim=32,
    num_layers=4,
    num_cross_attention_heads=4,
    cross_attention_head_dim=64,
    cross_attention_dim=256,
    caption_channels=192,
    qk_norm="rms_norm_across_heads",
    sample_size=4,
  )
  config.text_encoder = config_lib.Gemma2Config(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=384,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
    query_pre_attn_scalar=48,
    sliding_window=32,
  )
  config.train_text_encoder = True
  config.max_sequence_length = 24
  config.data.keyword_probability = 0.05
  config.data.keywords_only_probability = 0.01
  # With 512 numbers a picture, the noisy latent itself gives the emoji away up
  # to sigma = 0.85; only beyond is the caption learned. Shift 5 puts 45 % of
  # the samples there, shift 1 would put 4 %.
  config.flow.shift = 5.0
  config.flow.caption_dropout = 0.05
  config.flow.null_mask = "own"
  config.batch_size = 32
  config.num_steps = 8000
  config.optim.peak_lr = 1.5e-3
  config.optim.warmup_steps = 200
  config.optim.schedule = "cosine"
  config.optim.final_lr_ratio = 0.02
  config.optim.b2 = 0.99
  config.optim.clip_norm = 1.0
  config.optim.weight_decay = 1e-2
  config.ema_decay = 0.999
  config.dtype = "float32"
  config.remat = "none"
  config.scan_layers = False
  config.checkpoint.every = 500
  config.sample_every = 1000
  config.sample_prompts = (
    "red apple",
    "grinning face",
    "dog face",
    "flag: Japan",
    "woman firefighter: dark skin tone",
    "snowman",
    "rocket",
    "red heart",
    "man farmer: light skin tone",
    "sunflower",
    "keycap: 7",
    "ghost",
    "bicycle",
    "pizza",
    "thumbs up: medium skin tone",
    "blue square",
  )
  return config
