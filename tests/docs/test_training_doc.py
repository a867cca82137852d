"""docs/training.md and its like: configs, hardware and stages are real."""

import importlib
import re

import pytest

from tests import test_stage_configs
from tests.docs import reading

_CONFIG = re.compile(r"--config=configs/(\w+)\.py(?::(\S+))?")


@pytest.mark.parametrize("page", reading.PAGES, ids=reading.name)
def test_commands_name_configs_for_hardware_that_exist(page):
  for command in reading.commands(page):
    for word in command.argv:
      if found := _CONFIG.fullmatch(word):
        module = importlib.import_module(f"configs.{found[1]}")
        module.get_config(*filter(None, [found[2]]))


def test_the_table_of_stages_is_that_of_the_configs():
  text = reading.text(reading.ROOT / "docs/training.md")
  text = text.partition("## Fine-tuning")[0]
  rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text, re.MULTILINE))
  assert set(rows) == set(test_stage_configs.PUBLISHED)
  for name, row in rows.items():
    config = test_stage_configs.get(name)
    pixels, batch, _, effective, shift = row.split(" | ")
    assert int(pixels) == config.data.image_size
    assert int(batch) == config.batch_size
    assert float(shift) == config.flow.shift
    rate = config.optim.peak_lr * (config.batch_size / 256) ** 0.5
    assert float(effective) == pytest.approx(rate, rel=0.02)
