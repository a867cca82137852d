"""Optimisers: which, with what learning rate, and where their state is.

Inside, parameters are a flat {name: array}: patterns select by name, and names
look up the logical axes that say what is a stack of layers and what a matrix.
"""

from sana_jax.training.optim.build import make_optimizer
from sana_jax.training.optim.placement import state_shardings
from sana_jax.training.optim.schedule import make_schedule

__all__ = ["make_optimizer", "make_schedule", "state_shardings"]
