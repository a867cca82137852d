"""The training loop and the recipes that fill it."""
