"""Devices that are not there, and what is said of them."""

import importlib.util

import pytest

from sana_jax import hardware
from sana_jax.plan import topology


@pytest.mark.parametrize("name", ["v9:2x2", "v5e", "", "gtx1080:8"])
def test_unknown_chips_are_refused(name):
  with pytest.raises(ValueError, match="is not one of .*'v5e'.* such as v5e:"):
    topology.describe(name)


def test_there_is_at_least_one_slice():
  with pytest.raises(ValueError, match="num_slices must be at least 1, got 0"):
    topology.describe("v5e:2x2", num_slices=0)


@pytest.mark.parametrize("shape", ["0", "9", "2x4", "-1"])
def test_a_box_holds_one_to_eight_gpus(shape):
  with pytest.raises(ValueError, match="1 to 8 GPUs, such as h100:8"):
    topology.describe(f"h100:{shape}")


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match=r'pip install "jax\[tpu\]"'):
    topology.describe("v5e:2x2")


def test_without_the_cuda_plugin_the_error_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ModuleNotFoundError, match="pip install --no-deps jax-cu"):
    topology.describe("h100:8", num_slices=2)


def test_every_gpu_is_a_chip_whose_memory_and_bandwidth_agree():
  for name, gpu in topology.GPUS.items():
    chip = hardware.CHIPS[name]
    assert any(gpu.name.startswith(kind) for kind in chip.kinds)
    assert gpu.memory_bandwidth == chip.hbm_bandwidth
    assert 0.85 * gpu.memory_bytes < chip.hbm_bytes < gpu.memory_bytes


def test_gpus_are_described_with_balanced_braces_and_their_own_numbers():
  text = topology.target_config("a100")
  assert text.count("{") == text.count("}")
  assert "core_count: 108" in text
  assert "major: 8 minor: 0" in text
  assert "shared_memory_per_core: 167936" in text


def test_platforms_are_those_of_jax():
  assert topology.platform_of("v6e") == "tpu"
  assert topology.platform_of("h200") == "gpu"


@pytest.mark.tpu_aot
def test_slices_are_told_apart():
  pytest.importorskip("libtpu")
  found = topology.describe("v5e:2x2", num_slices=2)
  assert str(found) == "2 x v5e:2x2 (8 chips)"
  assert {device.slice_index for device in found.devices} == {0, 1}


@pytest.mark.tpu_aot
def test_a_shape_that_there_is_not_is_an_error():
  pytest.importorskip("libtpu")
  with pytest.raises(ValueError, match="'v5e:3x5x7' cannot be made"):
    topology.describe("v5e:3x5x7")
