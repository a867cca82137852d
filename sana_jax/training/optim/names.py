"""Optimising parameters by name: patterns select, frozen ones have no state."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sana_jax import sharding, tree

AxesFn = Callable[[str], sharding.Axes]


def axes_by_name(param_axes: Mapping[str, sharding.ParamAxes]) -> AxesFn:
  """Returns the function from a parameter's name to its logical axes.

  Args:
    param_axes: {component name: sharding rows of that module}.
  """

  def axes_of(name: str) -> sharding.Axes:
    component, _, rest = name.partition("/")
    for pattern, axes in param_axes.get(component, ()):
      if re.search(pattern, rest):
        return axes
    raise ValueError(
      f"No sharding row matches {name}; add one to the table of "
      f"{component!r} (tables: {sorted(param_axes)})."
    )

  return axes_of


def by_name(
  inner: optax.GradientTransformation,
  *,
  frozen: Sequence[str] = (),
  patterns: Mapping[str, Iterable[str]],
) -> optax.GradientTransformation:
  """Gives `inner` the trained parameters as {name: array}.

  Args:
    frozen: patterns of parameters that `inner` never sees; they stay.
    patterns: {what they are of: patterns}; each must match a name.

  Raises:
    ValueError: on `init`, a pattern that matches nothing, or all is frozen.
  """

  def flat(values: Any) -> dict[str, jax.Array]:
    named = zip(tree.leaf_names(values), jax.tree.leaves(values), strict=True)
    return {
      name: leaf for name, leaf in named if not tree.matches(name, frozen)
    }

  def init(params):
    _check_patterns(patterns, tree.leaf_names(params))
    trained = flat(params)
    if not trained:
      raise ValueError(
        f"optim.frozen {tuple(frozen)} matches every parameter: nothing is "
        "left to train."
      )
    return inner.init(trained)

  def update(gradients, state, params):
    updates, state = inner.update(flat(gradients), state, flat(params))

    def of(name, gradient):
      return updates[name] if name in updates else jnp.zeros_like(gradient)

    return tree.map_with_names(of, gradients), state

  return optax.GradientTransformation(init, update)


def scale_by_name(
  factors: Mapping[str, float],
) -> optax.GradientTransformation:
  """Multiplies updates by the factor of the first pattern that matches."""

  def factor(name: str) -> float:
    found = (f for pattern, f in factors.items() if re.search(pattern, name))
    return next(found, 1.0)

  return optax.stateless(
    lambda updates, params: {
      name: factor(name) * update for name, update in updates.items()
    }
  )


def _check_patterns(
  patterns: Mapping[str, Iterable[str]], names: Sequence[str]
) -> None:
  problems = []
  for field, candidates in patterns.items():
    for pattern in candidates:
      if not any(re.search(pattern, name) for name in names):
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.2)
        problems.append(
          f"{field} has {pattern!r}, which matches no parameter; near it: "
          f"{', '.join(near) or ', '.join(names[:3])}"
        )
  if problems:
    raise ValueError(f"{'; '.join(problems)}.")
