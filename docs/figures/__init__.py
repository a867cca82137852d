"""Figures of the documentation, drawn from the package's own code."""
