"""Data sets, transforms and loading."""
