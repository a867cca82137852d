"""A run knows its data again, and says what it does with them."""

import json
import logging
import os

import pytest

from sana_jax import config as config_lib
from sana_jax.data import opening
from sana_jax.training import ledger, scans
from tests import pictures


@pytest.fixture
def folder(tmp_path, rng):
  """Ten pictures, and two that are none."""
  files = {
    f"{i}.png": pictures.encode(pictures.picture(rng), "PNG") for i in range(10)
  }
  files |= {"x.png": b"", "y.png": b""}
  return pictures.write_folder(tmp_path / "folder", files)


def make(folder, workdir, **data):
  """The books of a run on the folder, four pictures a batch."""
  workdir.mkdir(exist_ok=True)
  config = config_lib.DataConfig(path=str(folder), image_size=32, **data)
  opened = opening.open_pictures(
    config,
    multiple=4,
    tokenize=lambda texts: {},
    batch_size=4,
    seed=0,
    find_scan=scans.shared(workdir / "scans"),
  )
  return ledger.Ledger(opened, allow_changed=config.allow_changed)


def test_the_same_data_are_scanned_once_and_taken_again(
  folder, tmp_path, caplog
):
  caplog.set_level(logging.INFO, logger="absl")
  for again in (False, True):
    make(folder, tmp_path / "run").begin(tmp_path / "run", has_learned=True)
    assert ("sizes are known from" in caplog.text) == again
  # What is broken is found again, with other data.
  (path,) = (tmp_path / "run" / "scans").iterdir()
  path.write_bytes(b"PK no")
  caplog.clear()
  make(folder, tmp_path / "run").begin(tmp_path / "run", has_learned=True)
  assert "is not a scan" in caplog.text


def test_files_that_were_replaced_are_scanned_again(folder, tmp_path, caplog):
  run = tmp_path / "run"
  (folder / "3.txt").write_text("a cat")
  make(folder, run).begin(run, has_learned=True)
  # Another caption, as long as before: the same batches, and it is said.
  os.utime(folder / "3.txt", ns=(0, 0))
  make(folder, run).begin(run, has_learned=True)
  assert "its files have changed" in caplog.text
  assert "files have changed since the run was started last" in caplog.text
  caplog.clear()
  make(folder, run).begin(run, has_learned=True)
  assert "changed" not in caplog.text
  # A picture that was mended is used, and one more is a change.
  (folder / "x.png").write_bytes((folder / "4.png").read_bytes())
  with pytest.raises(ValueError, match="used is 11, was 10; .*order is"):
    make(folder, run).begin(run, has_learned=True)


def test_changed_data_are_refused_until_allowed(folder, tmp_path, caplog):
  run = tmp_path / "run"
  make(folder, run).begin(run, has_learned=True)
  (folder / "3.png").unlink()
  for name in "abcde":
    (folder / f"{name}.png").write_bytes((folder / "4.png").read_bytes())
  with pytest.raises(
    ValueError,
    match="(?s)have changed: .*records is 16, was 12; .*used is 14, was 10; "
    ".*keys is .*--workdir.*data.allow_changed=True",
  ):
    make(folder, run).begin(run, has_learned=True)
  make(folder, run, allow_changed=True).begin(run, has_learned=True)
  assert "the data have changed" in caplog.text
  # From then on, these are its data.
  make(folder, run).begin(run, has_learned=True)


def test_before_anything_is_learned_the_data_may_change(folder, tmp_path):
  run = tmp_path / "run"
  make(folder, run).begin(run, has_learned=False)
  (folder / "3.png").unlink()
  make(folder, run).begin(run, has_learned=False)
  # These are its data now.
  make(folder, run).begin(run, has_learned=True)


def test_pictures_found_broken_by_decoding_are_a_change(folder, tmp_path):
  run = tmp_path / "run"
  whole = (folder / "2.png").read_bytes()
  (folder / "2.png").write_bytes(whole[:-200])
  make(folder, run).begin(run, has_learned=True)
  with pytest.raises(ValueError, match="used is 9, was 10; .*order is"):
    make(folder, run, verify=True).begin(run, has_learned=True)


def test_every_epoch_is_reported_with_all_that_was_skipped(
  folder, tmp_path, caplog
):
  caplog.set_level(logging.INFO, logger="absl")
  run = tmp_path / "run"
  books = make(folder, run)
  books.begin(run, has_learned=True)
  # 10 pictures, 4 a batch: epochs end with steps 2, 5 and 7.
  for step in range(6):
    books.note(step)
  lines = [record.getMessage() for record in caplog.records]
  assert lines[-1] == "epoch 2 has steps 6 to 7"
  assert "epoch 0 has steps 1 to 2" in lines
  ended = lines.index("epoch 1 ended with step 5:")
  assert "12 records, 10 used, 2 skipped (" in lines[ended + 1]
  assert "it has no bytes: x, y); 10 samples" in lines[ended + 1]
  assert lines[ended + 2] == "  0 samples left for the next epoch"
  assert "  2 samples left for the next epoch" in lines
  report = json.loads((run / "data_report.json").read_text())
  (source,) = report["sources"]
  assert (source["read"], source["used"], source["skipped"]) == (12, 10, 2)
  assert [*source["skipped_by_reason"].values()] == [["x", "y"]]
  first, second = report["epochs_ended"]
  assert (first["first_step"], first["last_step"]) == (1, 2)
  assert (second["trained"], second["carried_over"]) == (12, 0)
  assert second["sources"][0]["samples"] == 10
  assert sum(second["sources"][0]["skipped"].values()) == 2
  # A function of the step: a restart there says the same.
  assert books.report(5) == report
  assert make(folder, run).report(5) == report
  # Epochs that no logged step is in are summed up.
  assert "epoch 3, the last of 3, ended with step 10:" in books.lines(1, 11)
