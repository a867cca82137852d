"""What the documents on training tell to type can be typed."""

import importlib
import pathlib
import re

import pytest

from sana_jax import presets
from tests import test_stage_configs

ROOT = pathlib.Path(__file__).parents[1]
DOCS = [ROOT / "docs" / name for name in ("training.md", "launch.md")]


def commands(path: pathlib.Path) -> list[str]:
  """Everything that follows `train.py` in the blocks of a document."""
  blocks = re.findall(r"```sh\n(.*?)```", path.read_text(), re.DOTALL)
  joined = [block.replace("\\\n", " ") for block in blocks]
  return [
    line.partition("train.py")[2]
    for block in joined
    for line in block.splitlines()
    if "train.py" in line
  ]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: path.name)
def test_flags_and_configs_in_commands_exist(path):
  source = (ROOT / "train.py").read_text()
  known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
  assert {"config", "workdir", "coordinator"} <= known
  found = commands(path)
  assert found
  for command in found:
    assert set(re.findall(r"--(\w+)(?=[= ])", command)) <= known, command
    name, hardware = re.search(r"configs/(\w+)\.py:(\S+)", command).groups()
    config = importlib.import_module(f"configs.{name}").get_config(hardware)
    for field in re.findall(r"--config\.([\w.]+)=", command):
      value = config
      for part in field.split("."):
        inside = vars(value) if not isinstance(value, dict) else value
        assert part in inside, f"{field} in {command}"
        value = inside[part]


def test_the_text_names_only_flags_that_exist():
  source = (ROOT / "train.py").read_text()
  known = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source))
  text = re.sub(r"```.*?```", "", DOCS[1].read_text(), flags=re.DOTALL)
  assert set(re.findall(r"`--(\w+)`", text)) <= known | {"signal"}


def test_the_table_of_stages_is_that_of_the_configs():
  text = DOCS[0].read_text().partition("## Fine-tuning")[0]
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
  assert presets.parse("v5p-128x2").slices == 2
