"""Strict settings for all tests: eight devices, no silent broadcasting."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import beartype  # noqa: E402
import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

from tests import quick  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
  "jax_compilation_cache_dir",
  os.path.join(tempfile.gettempdir(), "sana_jax_test_cache"),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

# What --jaxtyping-packages in setup.cfg checks all signatures with; an int will
# do for a float (PEP 484).
typecheck = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))


def pytest_configure(config):
  """Compiles slow tests as users do, and all others quickly."""
  chosen = config.option.markexpr
  if "slow" not in chosen or "not slow" in chosen:
    os.environ["XLA_FLAGS"] += f" {quick.XLA_FLAGS}"


@pytest.fixture
def rng():
  """A NumPy generator with a fixed seed."""
  import numpy as np  # noqa: PLC0415

  return np.random.default_rng(0)


@pytest.fixture
def unchecked():
  """Turns type checks off, for tests of what the code itself refuses."""
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def nothing_compiled(monkeypatch):
  """Has pipelines compile anew what others of their shapes compiled before."""
  from collections import OrderedDict  # noqa: PLC0415

  from sana_jax.pipeline import execution  # noqa: PLC0415

  monkeypatch.setattr(execution, "_programs", OrderedDict())
