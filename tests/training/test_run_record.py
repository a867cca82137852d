"""A work directory explains itself."""

import json
import subprocess

import jax

from sana_jax.training import loop, run_record
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


def test_a_log_that_cannot_be_written_does_not_end_the_run(
  tmp_path, caplog, capsys
):
  (tmp_path / "run.log").mkdir()
  level = caplog.at_level("INFO", logger="absl")
  with level, run_record.logging_to(tmp_path / "run.log"):
    run_record.logging.info("a line")
  assert "IsADirectoryError" in capsys.readouterr().err
