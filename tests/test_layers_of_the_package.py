"""Imports go one way, files stay small, and nothing forbidden is used."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "sana_jax"

# A module may import from lower layers and from its own package.
LAYERS = (
  {
    *("config", "typing", "tree", "compilation_cache", "storage"),
    *("termination", "hardware", "host_memory", "devices", "notices"),
  },
  {"sharding", "resolution", "flops", "presets", "config_flag"},
  {"ops"},
  {"nn"},
  {"models", "diffusion"},
  {"data", "text", "checkpoint", "weights", "images"},
  {"pipeline"},
  {"training", "bulk", "precompute"},
  {"evaluation", "plan"},
  {"tools", "app"},
)
FORBIDDEN_NNX = {
  *("jit", "grad", "value_and_grad", "scan", "vmap", "remat", "split_rngs"),
  *("Optimizer", "bridge", "with_partitioning", "sow", "Dropout", "Sequential"),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def layer_of(module: str) -> int:
  for number, names in enumerate(LAYERS):
    if module in names:
      return number
  raise AssertionError(f"{module} belongs to no layer: add it to LAYERS")


def top_module(path: pathlib.Path) -> str:
  return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(source: str) -> set[str]:
  modules = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.ImportFrom) and node.module:
      parts = node.module.split(".")
      if parts[0] == "sana_jax":
        modules |= {parts[1]} if parts[1:] else {a.name for a in node.names}
    elif isinstance(node, ast.Import):
      for alias in node.names:
        parts = alias.name.split(".")
        if parts[0] == "sana_jax" and parts[1:]:
          modules.add(parts[1])
  return modules


@pytest.mark.parametrize(
  "path", FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_a_module_imports_lower_layers_only(path):
  own = top_module(path)
  if own == "__init__":
    return
  for module in imported_modules(path.read_text()) - {own}:
    assert layer_of(module) < layer_of(own), f"{own} must not import {module}"


@pytest.mark.parametrize(
  "path", FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_files_and_functions_stay_small(path):
  text = path.read_text()
  assert text.count("\n") <= 500
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.FunctionDef):
      lines = node.end_lineno - node.lineno + 1
      assert lines <= 80, f"{node.name} has {lines} lines"


@pytest.mark.parametrize(
  "path", FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_only_the_stable_part_of_nnx_is_used(path):
  used = {
    node.attr
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Attribute)
    and isinstance(node.value, ast.Name)
    and node.value.id == "nnx"
  }
  assert not used & FORBIDDEN_NNX


def test_a_config_file_imports_the_schema_and_presets_only():
  for path in (PACKAGE.parent / "configs").glob("*.py"):
    assert imported_modules(path.read_text()) <= {"config", "presets"}, path
