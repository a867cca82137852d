"""The first cell finds the package, or installs it, or says what to do."""

import importlib.util
import pathlib
import subprocess
import sys
import types

import pytest

from tests.notebooks import pairs


def first_cell(path: pathlib.Path) -> str:
  cells = pairs.cells_of_text(path.read_text(encoding="utf-8"))
  return next(cell.source for cell in cells if cell.kind == "code")


CELL = first_cell(pairs.TEXTS[0])


class Machine:
  """Where the package is missing, and pip only notes what it is given.

  Attributes:
    modules: that are there, by name, and their origins.
    installed: what pip was asked for; None: it was not called.
  """

  def __init__(self):
    self.modules = {}
    self.installed = None

  def find_spec(self, name):
    if name not in self.modules:
      return None
    return types.SimpleNamespace(origin=self.modules[name])

  def run(self, command, *, check):
    assert check
    start = [sys.executable, "-m", "pip", "install", "--quiet"]
    assert command[: len(start)] == start
    self.installed = [*map(str, command[len(start) :])]


@pytest.fixture
def machine(monkeypatch, tmp_path):
  (tmp_path / "content").mkdir()
  monkeypatch.chdir(tmp_path / "content")
  made = Machine()
  monkeypatch.setattr(importlib.util, "find_spec", made.find_spec)
  monkeypatch.setattr(subprocess, "run", made.run)
  monkeypatch.delitem(sys.modules, "google.colab", raising=False)
  return made


def put_on_colab(monkeypatch, uploaded: dict[str, bytes]) -> None:
  colab = types.ModuleType("google.colab")
  colab.files = types.SimpleNamespace(upload=lambda: uploaded)
  monkeypatch.setitem(sys.modules, "google", types.ModuleType("google"))
  monkeypatch.setitem(sys.modules, "google.colab", colab)


def run_cell(source: str = "..") -> None:
  assert CELL.count('SOURCE = ".."') == 1
  exec(CELL.replace('SOURCE = ".."', f"SOURCE = {source!r}"), {})  # noqa: S102


@pytest.mark.parametrize("path", pairs.TEXTS, ids=lambda path: path.stem)
def test_all_notebooks_have_the_same_first_cell(path):
  assert first_cell(path) == CELL


def test_nothing_is_installed_where_the_package_is(machine, monkeypatch):
  put_on_colab(monkeypatch, {"other.whl": b""})
  machine.modules["sana_jax"] = "sana_jax/__init__.py"
  run_cell()
  assert machine.installed is None


def test_colab_is_asked_for_the_wheel_and_keeps_its_accelerator(
  machine, monkeypatch
):
  put_on_colab(monkeypatch, {"sana_jax-0.1.0-py3-none-any.whl": b"..."})
  machine.modules |= {
    "sana_jax": None,  # a folder of that name
    "jax_cuda12_plugin": "somewhere",
  }
  run_cell()
  assert machine.installed == [
    *("sana_jax-0.1.0-py3-none-any.whl", "jax[cuda12]", "matplotlib")
  ]


@pytest.mark.parametrize("suffix", ["-0.1.0-py3-none-any.whl", ".zip"])
def test_a_second_upload_has_the_name_of_the_first(
  machine, monkeypatch, suffix
):
  name = pathlib.Path(f"sana_jax{suffix}")
  name.write_bytes(b"old")
  again = f"{name.stem} (12){name.suffix}"
  put_on_colab(monkeypatch, {again: b"new"})
  run_cell()
  assert machine.installed[0] == str(name)
  assert name.read_bytes() == b"new"


def test_a_tpu_keeps_its_library(machine, monkeypatch):
  put_on_colab(monkeypatch, {"sana_jax.zip": b"..."})
  machine.modules["libtpu"] = "somewhere"
  run_cell()
  assert machine.installed[:2] == ["sana_jax.zip", "jax[tpu]"]


@pytest.mark.parametrize("source", ["..", "../clone", "../made.whl"])
def test_a_clone_or_wheel_comes_before_an_upload(
  machine, monkeypatch, tmp_path, source
):
  put_on_colab(monkeypatch, {"other.whl": b""})
  if source.endswith(".whl"):
    (tmp_path / "made.whl").touch()
  else:
    package = pathlib.Path(source, "sana_jax")
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
  run_cell(source)
  # Whole: pip takes the name of a folder for that of a package.
  assert machine.installed[0] == str(pathlib.Path(source).resolve())


def test_an_address_is_left_to_pip(machine):
  run_cell("git+https://example.org/sana_jax")
  assert machine.installed[0] == "git+https://example.org/sana_jax"


@pytest.mark.parametrize("on_colab", [False, True])
def test_without_anything_the_error_says_what_to_set(
  machine, monkeypatch, on_colab
):
  if on_colab:
    put_on_colab(monkeypatch, {})  # nothing was chosen
  with pytest.raises(FileNotFoundError, match=r"SOURCE='\.\.' to a clone"):
    run_cell()
  assert machine.installed is None
