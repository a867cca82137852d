"""The notebooks and their texts, read with nothing but the standard library."""

import json
import pathlib
import re
from typing import Any, NamedTuple

DIRECTORY = pathlib.Path(__file__).parents[2] / "notebooks"
TEXTS = sorted(DIRECTORY.glob("*.py"))
STORED = sorted(DIRECTORY.glob("*.ipynb"))

_CELL = re.compile(r"^# %%(?: \[(markdown)\])?\n", re.MULTILINE)
_COMMENT = re.compile(r"^# ?", re.MULTILINE)


class Cell(NamedTuple):
  """A cell; `kind` is "code" or "markdown"."""

  kind: str
  source: str


def cells_of_text(text: str) -> list[Cell]:
  """Reads the percent format, of which the notebooks use the plain part."""
  _, *parts = _CELL.split(text)
  return [
    Cell("markdown", _COMMENT.sub("", body.strip()))
    if kind
    else Cell("code", body.strip())
    for kind, body in zip(parts[::2], parts[1::2], strict=True)
  ]


def cells_of_notebook(notebook: dict[str, Any]) -> list[Cell]:
  return [
    Cell(cell["cell_type"], "".join(cell["source"]))
    for cell in notebook["cells"]
  ]


def read(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text())


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
  return [
    output for cell in notebook["cells"] for output in cell.get("outputs", ())
  ]


def count_pictures(notebook: dict[str, Any]) -> int:
  return sum(
    any(kind.startswith("image/") for kind in output.get("data", {}))
    for output in outputs(notebook)
  )


def words(notebook: dict[str, Any]) -> str:
  """Returns what the outputs say, pictures left out."""
  found = []
  for output in outputs(notebook):
    found.append("".join(output.get("text", "")))
    for kind, data in output.get("data", {}).items():
      if kind.startswith("text/"):
        found.append("".join(data))
  return "\n".join(found)
