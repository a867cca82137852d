"""Shows shapes in signatures as they are written: Float[Array, "b n d"]."""

import ast
from typing import Any

import griffe


class Shapes(griffe.Extension):
  """Keeps strings in annotations strings.

  Otherwise those that happen to be Python, such as "b", lose their quotes, and
  become references to names that there are not. Modules that import
  `annotations` from `__future__` have theirs read so.
  """

  def on_module_instance(
    self, *, node: ast.AST, mod: griffe.Module, agent: Any, **kwargs: Any
  ) -> None:
    del node, agent, kwargs
    mod.set_member(
      "annotations", griffe.Alias("annotations", "__future__.annotations")
    )

  def on_module_members(
    self, *, node: ast.AST, mod: griffe.Module, agent: Any, **kwargs: Any
  ) -> None:
    del node, agent, kwargs
    mod.del_member("annotations")
