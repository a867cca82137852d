"""SANA text-to-image models in JAX."""

from sana_jax.pipeline import (
  SanaOutput,
  SanaPipeline,
  best_of,
  bundled_checkpoint,
)

__all__ = ["SanaOutput", "SanaPipeline", "best_of", "bundled_checkpoint"]
