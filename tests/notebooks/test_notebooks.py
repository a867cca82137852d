"""Every notebook runs, and what is stored shows no less, and no error."""

import re
import socket

import pytest

from tests import quick
from tests.notebooks import pairs

# What is told of the machine that a notebook was executed on.
PATHS = re.compile(r"(?<![\w.:/])/(?:\w[\w.-]*/)+\w|[A-Z]:\\\w|site-packages")
MOST_BYTES = 600_000

of_each = pytest.mark.parametrize("path", pairs.TEXTS, ids=lambda p: p.stem)


def test_every_text_has_a_notebook_and_every_notebook_a_text():
  assert pairs.TEXTS
  assert [p.stem for p in pairs.TEXTS] == [p.stem for p in pairs.STORED]


@of_each
def test_text_and_notebook_have_the_same_cells(path):
  stored = pairs.read(path.with_suffix(".ipynb"))
  expected = pairs.cells_of_text(path.read_text())
  assert len(expected) > 5
  assert pairs.cells_of_notebook(stored) == expected


@of_each
def test_stored_notebooks_show_pictures_and_no_error(path):
  stored = pairs.read(path.with_suffix(".ipynb"))
  assert pairs.count_pictures(stored) >= 2
  kinds = {output["output_type"] for output in pairs.outputs(stored)}
  assert "error" not in kinds
  names = {output.get("name", "stdout") for output in pairs.outputs(stored)}
  assert names == {"stdout"}, "a warning is shown to everybody who reads it"
  code = [c for c in stored["cells"] if c["cell_type"] == "code"]
  assert [c["execution_count"] for c in code] == [*range(1, len(code) + 1)]
  assert path.with_suffix(".ipynb").stat().st_size < MOST_BYTES


@of_each
def test_stored_notebooks_say_nothing_of_the_machine(path):
  words = pairs.words(pairs.read(path.with_suffix(".ipynb")))
  assert not PATHS.findall(words)
  assert socket.gethostname() not in words


def test_paths_of_machines_are_found():
  for told in ("in /home/me/x.py", "'/tmp/a/b'", "lib/site-packages/jax"):
    assert PATHS.search(told)
  for harmless in ("height / width", "6/8", "sana_jax/assets", "file://a/b"):
    assert not PATHS.search(harmless)


@pytest.mark.notebooks
@of_each
def test_notebooks_run_and_show_what_is_stored(path):
  from tests.notebooks import execution  # noqa: PLC0415 (an extra)

  notebook = execution.read_text(path)
  stored = pairs.read(path.with_suffix(".ipynb"))
  # By jupytext's reading of the text, too.
  assert pairs.cells_of_notebook(notebook) == pairs.cells_of_notebook(stored)
  execution.shorten(notebook, path.stem)
  execution.execute(notebook, quick.XLA_FLAGS)
  assert pairs.count_pictures(notebook) >= pairs.count_pictures(stored)
