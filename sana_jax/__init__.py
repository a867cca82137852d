"""SANA text-to-image models in JAX."""

from sana_jax.pipeline import SanaOutput, SanaPipeline, bundled_checkpoint

__all__ = ["SanaOutput", "SanaPipeline", "bundled_checkpoint"]
