"""From prompts to pictures, with a checkpoint directory."""

from sana_jax.pipeline.best_of import Best, best_of
from sana_jax.pipeline.denoising import Condition
from sana_jax.pipeline.execution import Progress
from sana_jax.pipeline.files import bundled_checkpoint
from sana_jax.pipeline.options import GenerationConfig
from sana_jax.pipeline.output import SanaOutput
from sana_jax.pipeline.text_to_image import SanaPipeline

__all__ = [
  "Best",
  "Condition",
  "GenerationConfig",
  "Progress",
  "SanaOutput",
  "SanaPipeline",
  "best_of",
  "bundled_checkpoint",
]
