"""Compiling is no speed."""

import pytest

from sana_jax import pipeline as pipeline_lib
from sana_jax.pipeline import meter

COMPILING = pipeline_lib.Progress("transformer", "compile", None)
COMPILED = pipeline_lib.Progress("transformer", "compile", 20.0)
RUNNING = pipeline_lib.Progress("transformer", "run", None)


class Clock:
  def __init__(self, now: float):
    self.now = now

  def __call__(self) -> float:
    return self.now


def test_only_batches_that_compiled_nothing_count_as_steady():
  clock = Clock(100.0)
  measured = meter.Meter(100, 0, 90.0, clock)
  for seconds, events in (
    (30.0, [COMPILING, COMPILED]),  # the first
    (2.0, [RUNNING]),
    (25.0, [COMPILING, COMPILED]),  # another size
    (3.0, [RUNNING]),
  ):
    for event in events:
      measured.event(event)
    clock.now += seconds
    measured.batch_done(8)
  measured.close()
  # 10 s of loading, and the first batch.
  assert measured.seconds_to_first_image == pytest.approx(40.0)
  assert measured.steady_images_per_second == pytest.approx(16 / 5)
  assert measured.summary() == "time to first image 40.0 s, " + (
    "steady images/s 3.20"
  )


def test_what_was_not_measured_is_not_reported():
  measured = meter.Meter(8, 0, 0.0)
  assert measured.summary() == "no image was made"
  measured.batch_done(8)
  measured.close()
  assert measured.steady_images_per_second is None
  assert "too few batches" in measured.summary()


def test_the_bar_shows_the_images_of_all_processes(capsys):
  measured = meter.Meter(100, 40, 0.0)
  measured.batch_done(8)
  measured.event(COMPILED)
  measured.batch_done(8)
  measured.close()
  assert "56/100" in capsys.readouterr().err
