"""The log line, the files, and how fast it all is."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sana_jax import config as config_lib
from sana_jax import hardware
from sana_jax.training import metrics, speed

FULL = {
  "loss": 0.18342,
  "grad_norm": 0.1218,
  "learning_rate": 1e-4,
  "loss/sigma_0.0_0.2": 0.5,
  "skipped": 2,
  "images_per_second": 1627.3,
  "images_per_second_per_device": 203.4125,
  "seconds_per_step": 0.63,
  "data_wait": 0.0031,
  "tflops_per_device": 92.13,
  "mfu": 0.4676,
  "hbm_peak_gib": 11.21,
  "hbm_limit_gib": 15.75,
  "seconds_left": 3723.2,
}


def test_one_line_says_it_all():
  assert metrics.format_line(120, 1000, FULL) == (
    "step 120/1000 12.0% loss 0.1834 lr 0.0001 grad_norm 0.1218 skipped 2 "
    "images/s 1627 (203.4/device) TFLOP/s/device 92.1 MFU 46.8% data 0.3% "
    "HBM 11.2/15.8 GiB eta 1:02:03"
  )


def test_what_is_not_known_is_left_out_of_the_line():
  values = {"loss": 2.0, "skipped": 0, "seconds_left": 61.0}
  line = metrics.format_line(3, 4, values)
  assert line == "step 3/4 75.0% loss 2 eta 0:01:01"


def test_a_resumed_run_rewrites_what_it_runs_again(tmp_path):
  def write(first_step, steps):
    writer = metrics.MetricWriter(tmp_path, enabled=True, first_step=first_step)
    for step in steps:
      writer.scalars(step, {"loss": 10.0 * first_step + step})
    writer.close()

  write(0, (1, 2, 3, 4))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 5, "lo')  # A killed process.
  write(2, (3, 4))
  rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
  losses = [json.loads(row)["loss"] for row in rows]
  assert losses == [1.0, 2.0, 23.0, 24.0]


def test_numbers_that_json_does_not_have_are_null(tmp_path):
  writer = metrics.MetricWriter(tmp_path, enabled=True, first_step=0)
  writer.scalars(1, {"loss": float("nan"), "grad_norm": float("inf")})
  writer.close()
  text = (tmp_path / "metrics.jsonl").read_text()
  assert '"loss": null, "grad_norm": null' in text


class Recording:
  """A sink that remembers."""

  def __init__(self):
    self.calls = []

  def scalars(self, step, values):
    self.calls.append(("scalars", step, values))

  def images(self, step, name, grid):
    self.calls.append(("images", step, name, grid.shape))

  def close(self):
    self.calls.append(("close",))


def test_another_sink_gets_all_of_it(tmp_path, rng):
  sink = Recording()
  writer = metrics.MetricWriter(tmp_path, enabled=True, first_step=0, sink=sink)
  picture = rng.integers(0, 256, (4, 6, 3)).astype(np.uint8)
  writer.scalars(1, {"loss": 0.5})
  writer.images(1, picture)
  writer.images(1, picture, "_raw")
  writer.close()
  assert sink.calls == [
    ("scalars", 1, {"loss": 0.5}),
    ("images", 1, "samples", (4, 6, 3)),
    ("images", 1, "samples_raw", (4, 6, 3)),
    ("close",),
  ]
  for name in ("step_0000001.png", "step_0000001_raw.png"):
    found = np.asarray(Image.open(tmp_path / "samples" / name))
    np.testing.assert_array_equal(found, picture)


def make_mean(first_step=0, notes=None, **changes):
  config = config_lib.CheckpointConfig(every=4, **changes)
  return metrics.WindowMean(config, first_step=first_step, notes=notes or {})


@pytest.mark.parametrize(("mode", "worst"), [("min", np.inf), ("max", -np.inf)])
def test_a_mean_leaves_out_what_is_not_finite(mode, worst):
  mean = make_mean(best_mode=mode)
  for step, value in enumerate((1.0, np.nan, 3.0, np.inf), 1):
    mean.add(step, {"loss": value})
  assert mean.of(4) == 2.0
  for step in range(5, 9):
    mean.add(step, {"loss": np.nan})
  assert mean.of(8) == worst


def test_a_mean_is_of_the_steps_of_a_whole_window(rng):
  values = rng.normal(size=13)
  mean = make_mean()
  for step in range(1, 13):
    mean.add(step, {"loss": values[step]})
    expected = values[step - 3 : step + 1].mean() if step % 4 == 0 else np.inf
    assert mean.of(step) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("stopped", range(1, 8))
def test_a_mean_that_was_noted_goes_on_exactly(rng, stopped):
  values = rng.normal(size=9)
  whole, mean = make_mean(), make_mean()
  for step in range(1, 9):
    for one in (whole, mean):
      one.add(step, {"loss": values[step]})
    if step == stopped:
      notes = json.loads(json.dumps(mean.notes))
      mean = make_mean(step, notes)
    assert mean.of(step) == whole.of(step)


def test_what_is_not_known_of_a_window_makes_its_checkpoint_lose():
  mean = make_mean()
  for step in (1, 2, 3):
    mean.add(step, {"loss": 1.0, "psnr": 2.0})
  # Without notes, of another metric, and with other windows.
  for other in (
    make_mean(3),
    make_mean(3, mean.notes, best_metric="psnr"),
    metrics.WindowMean(
      config_lib.CheckpointConfig(every=2), first_step=3, notes=mean.notes
    ),
  ):
    other.add(4, {"loss": 1.0, "psnr": 2.0})
    assert other.of(4) == np.inf
  mean.add(4, {"loss": 5.0})
  assert mean.of(4) == 2.0


def test_speed_leaves_out_pauses_and_the_first_interval():
  chrono = speed.Chrono(0, 100, batch_size=8, devices=4)
  chrono.count(1e9)
  assert chrono.tick(1, waited=0.5) == {}
  with chrono.paused():
    time.sleep(0.3)
  for _ in range(2):
    time.sleep(0.1)
    chrono.count(5e12)
  values = chrono.tick(3, waited=0.55)
  # A busy machine sleeps longer, never shorter.
  assert 0.1 <= values["seconds_per_step"] < 0.25
  rate = 8 / values["seconds_per_step"]
  assert values["images_per_second"] == pytest.approx(rate)
  assert values["images_per_second_per_device"] == pytest.approx(rate / 4)
  expected = 5 / values["seconds_per_step"] / 4
  assert values["tflops_per_device"] == pytest.approx(expected)
  assert values["data_wait"] == pytest.approx(
    0.05 / (2 * values["seconds_per_step"])
  )
  assert values["seconds_left"] == pytest.approx(
    97 * values["seconds_per_step"]
  )
  # Nobody says what this processor could do.
  assert hardware.chip_of(jax.devices()[0]) is None
  assert "mfu" not in values


def test_devices_say_what_memory_they_have_or_nothing():
  jax.block_until_ready(jnp.ones(8))
  found = speed.device_memory()
  assert (found == {}) == (jax.local_devices()[0].memory_stats() is None)
