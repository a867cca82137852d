"""The web page, a client of the service like any other."""

from sana_jax.app.page.layout import build, mount

__all__ = ["build", "mount"]
