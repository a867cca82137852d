"""The arithmetic of times."""

import pytest

from sana_jax import config as config_lib
from sana_jax import flops, hardware
from sana_jax.plan import roofline

CHIP = hardware.Chip(1e14, 2**34, 1e12, 1e11, 1e10, kinds=("made up",))
MESH = {"data": 4, "fsdp": 8, "tensor": 1, "sequence": 1}


def make_config(**changes):
  return config_lib.TextToImageConfig(
    model=config_lib.sana_1600m(), batch_size=32, **changes
  )


def test_a_step_has_the_operations_of_the_model_for_every_image():
  # 2.967 TFLOP forward at 1024 pixels, once more to recompute and twice more
  # backward.
  assert roofline.step_flops(make_config(), (32, 32)) == pytest.approx(
    32 * 4 * 2.967e12, rel=5e-3
  )
  forward = flops.forward(config_lib.sana_1600m(), 1024, 1024)
  assert roofline.step_flops(make_config(remat="none"), (32, 32)) == (
    32 * 3 * forward
  )


def test_computing_is_shared_by_the_chips_at_the_stated_efficiency():
  config = make_config()
  seconds = roofline.compute_seconds(
    config, CHIP, chips=32, latent_size=(32, 32), efficiency=0.5
  )
  work = roofline.step_flops(config, (32, 32))
  assert seconds == pytest.approx(work / (32 * 0.5e14))


def test_memory_time_grows_with_state_and_tokens():
  def seconds(**changes):
    values = {"state_bytes": 10**9, "tokens": 1024.0, "parameters": 1.6e9}
    return roofline.memory_seconds(make_config(), CHIP, **values | changes)

  # The state is read and written.
  assert seconds(state_bytes=2 * 10**9) - seconds() == pytest.approx(2e-3)
  doubled = seconds(tokens=2048.0) - seconds()
  # A forward pass of a block takes some 200 bytes a token and width.
  blocks = 4 * 1024 * 20 * 2240 * 200 / 1e12
  assert doubled == pytest.approx(blocks, rel=0.4)


def test_links_carry_everything_in_one_slice():
  sent = {(("fsdp",), "all-gather"): 3e9, (("data",), "all-reduce"): 1e9}
  assert roofline.network_seconds(sent, CHIP, MESH) == pytest.approx(0.04)


def test_between_slices_a_chip_sends_its_share_of_the_copies_sums():
  sent = {(("fsdp",), "all-gather"): 1e8, (("data",), "all-reduce"): 1e9}
  seconds = roofline.network_seconds(sent, CHIP, MESH, num_slices=2)
  assert seconds == pytest.approx(1e9 / 2 / 1e10)


def test_the_longest_bounds_a_step():
  times = roofline.Times(compute=0.2, memory=0.1, network=0.3)
  assert (times.step, times.bound) == (0.3, "network")


def test_hours_follow_from_the_step():
  found = roofline.predict(0.5, batch_size=1000, chips=8, num_images=7.2e6)
  assert found == roofline.Prediction(2000.0, 1.0, 8.0)
