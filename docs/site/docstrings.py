"""Shows docstrings and signatures as they are written."""

import ast
import itertools
from typing import Any

import griffe


class AsWritten(griffe.Extension):
  """Keeps shapes strings, and formulas on lines of their own."""

  def on_module_instance(
    self, *, node: ast.AST, mod: griffe.Module, agent: Any, **kwargs: Any
  ) -> None:
    """Reads annotations as those of modules that have future ones.

    Otherwise shapes that happen to be Python, such as "b", lose their quotes,
    and become references to names that there are not.
    """
    del node, agent, kwargs
    mod.set_member(
      "annotations", griffe.Alias("annotations", "__future__.annotations")
    )

  def on_module_members(
    self, *, node: ast.AST, mod: griffe.Module, agent: Any, **kwargs: Any
  ) -> None:
    del node, agent, kwargs
    mod.del_member("annotations")

  def on_instance(
    self, *, node: ast.AST, obj: griffe.Object, agent: Any, **kwargs: Any
  ) -> None:
    """Sets paragraphs that are indented as Markdown sets code."""
    del node, agent, kwargs
    if obj.docstring is not None:
      obj.docstring.value = formulas_as_code(obj.docstring.value)


def formulas_as_code(text: str) -> str:
  """Indents paragraphs that begin with two spaces by four.

  Those of a section such as "Args:" follow its name at once, and stay.
  """
  paragraphs = []
  for blank, lines in itertools.groupby(text.split("\n"), lambda s: not s):
    lines = list(lines)
    if not blank and lines[0].startswith("  "):
      lines = [f"  {line}" for line in lines]
    paragraphs += lines
  return "\n".join(paragraphs)
