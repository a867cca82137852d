"""A folder of pictures to a small text-to-image model at 64 pixels.

With the autoencoder and the text encoder of the model that ships, on a laptop:
`--config.data.path=DIR`, or `--config.data.cache=DIR` of sana_jax.precompute.
"""

from configs import emoji
from sana_jax import config as config_lib

_MODEL = "sana_jax/assets/emoji_model"


def get_config() -> config_lib.TextToImageConfig:
  """Returns the emoji run with other data and a fixed text encoder."""
  config = emoji.get_config()
  config.train_text_encoder = False
  config.text_encoder_path = f"{_MODEL}/text_encoder"
  # An empty path is to be given: without one, it would be the emoji.
  # Squares, or what a cache was made with.
  config.data = config_lib.DataConfig(image_size=64, path="")
  config.num_steps = 1000
  config.checkpoint.every = 200
  config.sample_every = 200
  config.sample_prompts = ("a red flower in a garden", "a cat", "a rocket")
  return config
