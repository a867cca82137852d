"""Statistics of a layer must not mix with those of the layers it is stacked on.

Blocks are stacked along a leading axis, so a mean over a leaf would be one over
all of them, and the two largest axes of a leaf need not be those of its matrix.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax


def per_layer(
  inner: optax.GradientTransformation, is_stacked: Callable[[str], bool]
) -> optax.GradientTransformation:
  """Applies `inner` to {name: array}, to each layer of a stack on its own.

  The state is {group: state of `inner`}, with a group for every number of
  layers; counts are shared by the layers, other arrays are stacked.

  Args:
    is_stacked: whether the first axis of the leaf of that name counts layers.
  """

  def groups(leaves: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, leaf in leaves.items():
      group = f"layers_{leaf.shape[0]}" if is_stacked(name) else "whole"
      found.setdefault(group, {})[name] = leaf
    return found

  def state_axes(leaves):
    one = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), leaves
    )
    state = jax.eval_shape(inner.init, one)
    return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, state)

  def init_group(group, leaves):
    if group == "whole":
      return inner.init(leaves)
    return jax.vmap(inner.init, out_axes=state_axes(leaves))(leaves)

  def update_group(group, updates, state, params):
    if group == "whole":
      return inner.update(updates, state, params)
    axes = state_axes(params)
    function = jax.vmap(inner.update, in_axes=(0, axes, 0), out_axes=(0, axes))
    return function(updates, state, params)

  def init(params):
    return {
      group: init_group(group, leaves)
      for group, leaves in groups(params).items()
    }

  def update(updates, state, params):
    new, states, params = {}, {}, groups(params)
    for group, leaves in groups(updates).items():
      updated, states[group] = update_group(
        group, leaves, state[group], params[group]
      )
      new |= updated
    return new, states

  return optax.GradientTransformation(init, update)
