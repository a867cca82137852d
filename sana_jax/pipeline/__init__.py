"""From prompts to pictures, with a checkpoint directory."""

from sana_jax.pipeline.denoising import Condition
from sana_jax.pipeline.execution import Progress
from sana_jax.pipeline.files import bundled_checkpoint
from sana_jax.pipeline.options import GenerationConfig
from sana_jax.pipeline.text_to_image import SanaOutput, SanaPipeline

__all__ = [
  "Condition",
  "GenerationConfig",
  "Progress",
  "SanaOutput",
  "SanaPipeline",
  "bundled_checkpoint",
]
