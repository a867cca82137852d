"""How figures are written."""

import jax
import pytest

from bench.harness import ceilings, records, tables


def test_a_table_lines_up():
  assert tables.markdown(("a", "long"), [(1, 2), ("three", "4")]) == (
    "| a     | long |\n|-------|------|\n| 1     | 2    |\n| three | 4    |\n"
  )
  with pytest.raises(ValueError, match="has not the 2 cells"):
    tables.markdown(("a", "b"), [(1,)])


@pytest.mark.parametrize(
  ("value", "written"),
  [(12.34, "12.3 s"), (0.0456, "45.6 ms"), (7.89e-6, "7.89 us"), (None, "-")],
)
def test_seconds_have_a_unit_that_suits(value, written):
  assert tables.seconds(value) == written


def test_other_quantities_have_prefixes():
  assert tables.quantity(2.967e12, "FLOP") == "2.97 TFLOP"
  assert tables.quantity(512, "B") == "512 B"
  assert tables.quantity(0, "B") == "0 B"
  assert tables.quantity(float("nan"), "B") == "-"
  assert tables.share(1.0, 4.0) == "25%"
  assert tables.share(1.0, None) == "-"
  interval = {"median": 0.951, "low": 0.9, "high": 1.02}
  assert tables.ratio(interval) == "0.95 (0.90-1.02)"


def test_a_record_says_where_it_comes_from():
  found = records.environment("bench.sample", ["--size=tiny"])
  assert found["command"] == "python -m bench.sample --size=tiny"
  assert found["versions"]["jax"] == jax.__version__
  assert found["platform"] == "cpu"
  assert found["cores"] >= 1
  assert len(found["processor"]) > 3
  assert len(found["date"]) == 10


def test_ceilings_are_measured():
  found = ceilings.measure("float32", side=64, megabytes=1)
  assert found.flops > 1e6
  assert found.bandwidth > 1e6
  assert found.stated_flops is None
