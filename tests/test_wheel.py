"""A wheel has all files of the package: code, data sets and the bundled model.

It is asked of setuptools, which makes the wheel; nothing is built.
"""

import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def test_a_wheel_has_every_file_of_the_package(monkeypatch):
  setuptools = pytest.importorskip("setuptools")
  monkeypatch.chdir(ROOT)
  distribution = setuptools.Distribution({"script_name": "setup.py"})
  distribution.parse_config_files(["setup.cfg"])
  build = distribution.get_command_obj("build_py")
  build.ensure_finalized()
  packed = {str(pathlib.Path(path)) for path in build.get_source_files()}
  packed |= {
    str(pathlib.Path(directory, name))
    for _, directory, _, names in build.data_files
    for name in names
  }
  there = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "sana_jax").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
  }
  assert "sana_jax/assets/emoji_model/vae/config.json" in there
  assert there - packed == set()
  assert all(path.startswith("sana_jax/") for path in packed)
