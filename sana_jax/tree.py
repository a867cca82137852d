"""Names for the leaves of a pytree: the paths used by tables and files."""

import re
from collections.abc import Iterable
from typing import Any

import jax

# Flax keeps a Param's array under one of these keys; a path ends before it.
_VARIABLE_KEYS = ("value", "raw_value")


def leaf_names(tree: Any) -> list[str]:
  """Lists 'blocks/point/kernel'-like paths, in the order of jax.tree.leaves."""
  paths = jax.tree_util.tree_flatten_with_path(tree)[0]
  return [_name(path) for path, _ in paths]


def map_with_names(function, tree: Any) -> Any:
  """Maps function(name, leaf) over the leaves."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: function(_name(path), leaf), tree
  )


def matches(name: str, patterns: Iterable[str]) -> bool:
  """True when one of the regular expressions is found in the name."""
  return any(re.search(pattern, name) for pattern in patterns)


def to_nested_dict(tree: Any) -> dict[str, Any]:
  """Turns any pytree into nested dicts keyed by the parts of the names."""
  nested: dict[str, Any] = {}
  for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
    *parents, last = name.split("/")
    node = nested
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return nested


def from_nested_dict(nested: dict[str, Any], like: Any) -> Any:
  """Inverse of `to_nested_dict`, into the structure of `like`."""
  leaves = []
  for name in leaf_names(like):
    node = nested
    for part in name.split("/"):
      node = node[part]
    leaves.append(node)
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _name(path: tuple[Any, ...]) -> str:
  keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
  if len(keys) > 1 and keys[-1] in _VARIABLE_KEYS:
    keys.pop()
  return "/".join(keys)
