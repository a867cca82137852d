"""SANA text-to-image models in JAX.

Importing this loads nothing; `from sana_jax import pipeline` and so on do.
"""
