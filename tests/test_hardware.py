"""The chips that are known."""

import types

import pytest

from sana_jax import hardware


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6 lite", "v6e"),
    ("NVIDIA H100 80GB HBM3", "h100"),
    ("NVIDIA H200", "h200"),
    ("cpu", None),
  ],
)
def test_a_device_is_recognised_by_its_kind(kind, name):
  device = types.SimpleNamespace(device_kind=kind)
  assert hardware.chip_of(device) == name
