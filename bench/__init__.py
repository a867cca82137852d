"""Measurements of sana_jax; each module is a program with --help."""
