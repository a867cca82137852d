"""Names for what crosses module borders."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

from jaxtyping import Array, PyTree

# Any pytree of arrays, among them a model.
Params: TypeAlias = PyTree

Batch: TypeAlias = Mapping[str, Array]

# (x "b ...", sigma "b", timestep "b") -> velocity "b ...". `sigma` is the noise
# level in [0, 1], 0 data and 1 noise; `timestep` is the same moment in the
# checkpoint's own units: `lambda x, _, t: model(x, t, text, mask)`.
VelocityFn: TypeAlias = Callable[[Array, Array, Array], Array]

# Gives the velocity under a condition, a pytree of arrays "b ..." such as the
# text. What it computes itself, not the function it returns, is computed once
# for all steps of a sampler.
ConditionalVelocityFn: TypeAlias = Callable[[PyTree], VelocityFn]
