"""Measuring what a model makes."""
