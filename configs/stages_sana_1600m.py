"""SANA 1.6B from random numbers to 4096 pixels: 512, 1024, 2K, 4K.

  python train.py --config=configs/stages_sana_1600m.py:v5p-64 \
    --workdir=runs/sana --config.stages.px512.data.cache=CACHE_512 \
    --config.stages.px1024.data.cache=CACHE_1024 ...

Each stage begins with the average of the one before. Killed anywhere, the same
command goes on in the stage that was running.
"""

from configs import (
  sana_1600m_2k,
  sana_1600m_4k,
  sana_1600m_512,
  sana_1600m_1024,
)
from sana_jax import config as config_lib


def get_config(hardware: str | None = None) -> config_lib.StagesConfig:
  """Returns the published stages, spread over the hardware."""
  return config_lib.StagesConfig(
    stages={
      "px512": sana_1600m_512.get_config(hardware),
      "px1024": sana_1600m_1024.get_config(hardware),
      "px2048": sana_1600m_2k.get_config(hardware),
      "px4096": sana_1600m_4k.get_config(hardware),
    }
  )
