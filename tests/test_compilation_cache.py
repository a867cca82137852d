"""Compiled programs are kept where users expect caches."""

import pathlib

import jax
import pytest

from sana_jax import compilation_cache


@pytest.fixture
def setting():
  """Lets a test change what conftest.py has set."""
  before = jax.config.jax_compilation_cache_dir
  yield lambda value: jax.config.update("jax_compilation_cache_dir", value)
  jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
  ("environment", "expected"),
  [
    ({"XDG_CACHE_HOME": "/caches"}, pathlib.Path("/caches/sana_jax")),
    ({"XDG_CACHE_HOME": "caches"}, pathlib.Path.home() / ".cache/sana_jax"),
    ({"XDG_CACHE_HOME": ""}, pathlib.Path.home() / ".cache/sana_jax"),
    ({}, pathlib.Path.home() / ".cache/sana_jax"),
  ],
)
def test_the_default_is_the_users_cache_directory(environment, expected):
  assert compilation_cache.default_directory(environment) == expected


@pytest.mark.parametrize(
  ("before", "directory", "after"),
  [
    (None, None, "/caches/sana_jax"),
    ("/set", None, "/set"),
    ("/set", "/flag", "/flag"),
    ("/set", "", None),
    (None, "", None),
  ],
)
def test_a_flag_wins_over_a_setting_and_that_over_the_default(
  setting, before, directory, after
):
  setting(before)
  compilation_cache.enable(directory, {"XDG_CACHE_HOME": "/caches"})
  assert jax.config.jax_compilation_cache_dir == after
