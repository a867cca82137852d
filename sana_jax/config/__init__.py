"""Typed configuration: the schema of everything.

A config is editable until `freeze()`; an unknown name is an error in both
phases. Files in `configs/` import this module and `sana_jax.presets` only.
"""

from sana_jax.config.base import (
  Config,
  from_dict,
)
from sana_jax.config.data import DataConfig, SourceConfig
from sana_jax.config.hardware import HardwareConfig
from sana_jax.config.models import (
  DCAEConfig,
  Gemma2Config,
  SanaBlocksConfig,
  SanaConfig,
  SanaControlNetConfig,
  dc_ae_lite,
  sana15_1600m,
  sana15_4800m,
  sana_600m,
  sana_1600m,
  sana_1600m_2k,
  sana_1600m_4k,
  sana_controlnet_600m,
  sana_controlnet_1600m,
  sana_sprint_600m,
  sana_sprint_1600m,
)
from sana_jax.config.optim import OptimConfig
from sana_jax.config.recipes import (
  AutoencoderConfig,
  FlowConfig,
  TextToImageConfig,
)
from sana_jax.config.training import TrainConfig

__all__ = [
  "AutoencoderConfig",
  "Config",
  "DCAEConfig",
  "DataConfig",
  "FlowConfig",
  "Gemma2Config",
  "HardwareConfig",
  "OptimConfig",
  "SanaBlocksConfig",
  "SanaConfig",
  "SanaControlNetConfig",
  "SourceConfig",
  "TextToImageConfig",
  "TrainConfig",
  "dc_ae_lite",
  "from_dict",
  "sana15_1600m",
  "sana15_4800m",
  "sana_1600m",
  "sana_1600m_2k",
  "sana_1600m_4k",
  "sana_600m",
  "sana_controlnet_600m",
  "sana_controlnet_1600m",
  "sana_sprint_1600m",
  "sana_sprint_600m",
]
