"""The table of planned steps, and the records of it that are kept."""

import json
import pathlib

import pytest
from etils import epath

from bench import plan as bench_plan

RECORDS = pathlib.Path(__file__).parents[2] / "docs" / "plan"


@pytest.mark.parametrize("path", sorted(RECORDS.glob("*.json")), ids=str)
def test_kept_records_are_of_their_rows_and_gather_no_activation(path):
  record = json.loads(path.read_text())
  row = bench_plan.ROWS[path.stem]
  assert row.topology in record["title"]
  assert record["fits"] == (record["total_bytes"] <= record["hbm_bytes"])
  assert record["gathered_activations"] == []


@pytest.mark.parametrize("name", bench_plan.ROWS)
def test_a_device_sends_at_most_a_tenth_more_than_the_least(name):
  record = json.loads((RECORDS / f"{name}.json").read_text())
  if record["least_bytes"]:
    assert record["ratio"] <= 1.10
  else:
    assert not record["sent_bytes"]


def test_with_more_copies_a_device_sends_hardly_more():
  few, many = (
    json.loads((RECORDS / f"1600m_v5e_{name}.json").read_text())
    for name in ("8x8", "16x16")
  )
  sent = lambda record: sum(record["sent_bytes"].values())  # noqa: E731
  assert sent(many) <= 1.02 * sent(few)


def test_the_page_has_the_table_of_the_records():
  page = RECORDS.with_suffix(".md").read_text()
  assert bench_plan.table(epath.Path(RECORDS)) in page


def test_the_table_has_a_line_for_every_record(tmp_path):
  record = {
    "memory_bytes": {
      "parameters": 2**30,
      "optimiser": 2**31,
      "average": 2**30,
      "temporaries": 2**33,
    },
    "total_bytes": 12 * 2**30,
    "hbm_bytes": 15.75 * 2**30,
    "sent_bytes": {"fsdp:all-gather": 3e9, "data:all-reduce": 0.3e9},
    "least_bytes": {"fsdp:all-gather": 3e9},
    "ratio": 1.1,
    "prediction": {"images_per_second": 123.4},
  }
  (tmp_path / "1600m_v5e_16x16.json").write_text(json.dumps(record))
  lines = bench_plan.table(epath.Path(tmp_path)).splitlines()
  assert len(lines) == 3
  assert lines[2] == (
    "| sana_1600m, v5e:16x16 | data=16 fsdp=16 | 4 | 4.00 GiB | 12.00 GiB | "
    "15.75 | 3.30 | 3.00 | 1.10 | 123 |"
  )
