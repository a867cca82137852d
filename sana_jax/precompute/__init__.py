"""Latents and text states of a source, made once for all training runs."""
