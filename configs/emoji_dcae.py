"""DC-AE f16c32 for 64-pixel emoji: 4x4 latent tokens, 3.3M parameters."""

from sana_jax import config as config_lib


def get_config() -> config_lib.AutoencoderConfig:
  """Returns the run that made the autoencoder that ships (see its card)."""
  config = config_lib.AutoencoderConfig()
  blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 2
  config.model = config_lib.DCAEConfig(
    # The first stage is empty: the outer convolutions resample by two.
    encoder_block_types=blocks,
    decoder_block_types=blocks,
    encoder_block_out_channels=(32, 32, 64, 128, 128),
    decoder_block_out_channels=(32, 32, 64, 128, 128),
    encoder_layers_per_block=(0, 1, 1, 2, 2),
    decoder_layers_per_block=(0, 1, 2, 2, 2),
    encoder_qkv_multiscales=((), (), (), (5,), (5,)),
    decoder_qkv_multiscales=((), (), (), (5,), (5,)),
    scaling_factor=1.0,
  )
  config.batch_size = 16
  config.num_steps = 1700
  config.optim.peak_lr = 1e-3
  config.optim.warmup_steps = 100
  config.optim.schedule = "cosine"
  config.optim.final_lr_ratio = 0.02
  config.optim.b2 = 0.99
  config.optim.clip_norm = 1.0
  config.optim.weight_decay = 1e-4
  config.ema_decay = 0.998
  config.latent_noise = 0.1
  config.latent_penalty = 1e-3
  config.dtype = "float32"
  config.remat = "none"
  config.scan_layers = False
  config.checkpoint.every = 250
  config.sample_every = 500
  return config
