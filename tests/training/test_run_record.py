"""A work directory explains itself."""

import json
import subprocess

import jax
import pytest

from sana_jax.training import checks, loop, run_record, workdir
from tests.training import test_loop


def test_every_start_of_a_run_is_described(tmp_path):
  config = test_loop.make_config
  options = loop.Options(argv=("train.py", "--config=x"))
  loop.train(config(num_steps=4), tmp_path, test_loop.make_recipe(), options)
  loop.train(
    config(num_steps=6, mesh={"data": 2, "fsdp": 4}),
    *(tmp_path, test_loop.make_recipe()),
  )
  first, second = json.loads((tmp_path / "run.json").read_text())
  assert first["command"] == ["train.py", "--config=x"]
  assert (first["first_step"], second["first_step"]) == (0, 4)
  assert second["mesh"]["fsdp"] == 4
  assert first["devices"] == jax.device_count()
  assert first["device_kind"] == jax.devices()[0].device_kind
  assert first["versions"]["jax"] == jax.__version__
  head = subprocess.run(
    ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
  )
  expected = head.stdout.strip() if head.returncode == 0 else None
  assert (first["git"] or {}).get("commit") == expected


def test_the_log_of_a_run_is_kept_over_its_starts(tmp_path, caplog):
  for steps in (4, 8):
    config = test_loop.make_config(num_steps=steps)
    with caplog.at_level("INFO", logger="absl"):
      loop.train(config, tmp_path, test_loop.make_recipe())
  lines = (tmp_path / "run.log").read_text().splitlines()
  shown = [line for line in lines if " metrics.py:" in line]
  assert len(shown) == 4
  assert "step 2/4 50.0% loss " in shown[0]
  assert "step 8/8 100.0% loss" in shown[-1]
  assert any("resuming from step 4" in line for line in lines)


def test_warnings_of_the_config_are_in_the_log(tmp_path, caplog):
  """Once; where the run is refused, nothing is."""
  config = test_loop.make_config(num_steps=2)
  loop.train(config, tmp_path, test_loop.make_recipe())
  config = test_loop.make_config(num_steps=4)
  config.optim.peak_lr = 0.01
  caplog.clear()
  loop.train(config, tmp_path, test_loop.make_recipe())
  log = (tmp_path / "run.log").read_text()
  never, otherwise = [x for x in log.splitlines() if x.startswith("W")]
  assert "optim.warmup_steps (2) is not less than num_steps (2)" in never
  assert "optim.peak_lr was 0.05, now 0.01: the run learns oth" in otherwise
  assert [x for x in caplog.records if x.getMessage() in otherwise]
  config = test_loop.make_config(num_steps=4, seed=1)
  with pytest.raises(ValueError, match="another config; differing: .*seed"):
    loop.train(config, tmp_path, test_loop.make_recipe())
  assert (tmp_path / "run.log").read_text() == log


def test_other_processes_than_the_first_do_not_repeat_them(
  tmp_path, caplog, monkeypatch
):
  caplog.set_level("INFO", logger="absl")
  workdir.claim(test_loop.make_config(), tmp_path, has_learned=False)
  described = (tmp_path / "config.json").read_text()
  config = test_loop.make_config(num_steps=2)
  config.optim.peak_lr = 0.01
  for number in (1, 0):
    monkeypatch.setattr(jax, "process_index", lambda number=number: number)
    workdir.claim(config, tmp_path, has_learned=True)
    checks.warn_of_length(config, None, None)
    if number == 1:
      assert not caplog.records
      assert (tmp_path / "config.json").read_text() == described
  assert len(caplog.records) == 2


def test_a_log_that_cannot_be_written_does_not_end_the_run(
  tmp_path, caplog, capsys
):
  (tmp_path / "run.log").mkdir()
  level = caplog.at_level("INFO", logger="absl")
  with level, run_record.logging_to(tmp_path / "run.log"):
    run_record.logging.info("a line")
  assert "IsADirectoryError" in capsys.readouterr().err
