"""Layers shared by the models; no model knowledge."""
