"""A linear layer with a low-rank update kept apart from its kernel."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from sana_jax import sharding
from sana_jax.nn import layers


class LowRankLinear(layers.Linear):
  """y = x @ kernel + bias + (x @ down) @ up over the last axis.

  Kernel and bias are those of the layer it takes the place of, so that tables
  which name them still apply. An update made of several has them side by side
  on the rank axis; on a layer that already is low-rank, they are appended.

  Args:
    linear: parameters may be stacked over blocks, as `down` and `up` then are.

  Source: Hu et al., LoRA, arXiv:2106.09685, equation 3; `up` contains the
  factor alpha / r.
  """

  def __init__(
    self,
    linear: layers.Linear,
    down: Float[Array, "*stack i r"],
    up: Float[Array, "*stack r o"],
  ):
    self.dtype = linear.dtype
    self.axes = linear.axes
    self.kernel = linear.kernel
    self.bias = linear.bias
    if isinstance(linear, LowRankLinear):
      down = jnp.concatenate([linear.down[...], down], axis=-1)
      up = jnp.concatenate([linear.up[...], up], axis=-2)
    self.down = nnx.Param(down)
    self.up = nnx.Param(up)

  def __call__(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    return super().__call__(x) + self._update(x)

  def split(
    self, x: Float[Array, "*b i"], parts: int, axis: str
  ) -> tuple[Float[Array, "*b o"], ...]:
    if sharding.shards(axis) == 1:
      return tuple(jnp.split(self(x), parts, axis=-1))
    updates = jnp.split(self._update(x), parts, axis=-1)
    return tuple(
      y + update
      for y, update in zip(super().split(x, parts, axis), updates, strict=True)
    )

  def _update(self, x: Float[Array, "*b i"]) -> Float[Array, "*b o"]:
    x = x.astype(self.dtype) @ self.down[...].astype(self.dtype)
    return x @ self.up[...].astype(self.dtype)


# To follow the rows of a model that has such layers; updates are small.
PARAM_AXES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
  (r"^blocks/.*/(down|up)$", ("layers", None, None)),
  (r"/(down|up)$", (None, None)),
)
