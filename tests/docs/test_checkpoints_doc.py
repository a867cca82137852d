"""docs/checkpoints.md: its table, its commands and its recipe hold."""

import pathlib
import re
import shlex

import pytest
from flax import nnx

from sana_jax.models import sana
from sana_jax.tools import convert, inspect, parity, recognition
from sana_jax.weights import components, opening, zoo
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")


def table_rows() -> list[list[str]]:
  lines = [line for line in TEXT.splitlines() if line.startswith("|")]
  rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
  return [row for row in rows if len(row) == 6 and row[1][0] == "`"]


def commands(module: str) -> list[list[str]]:
  """The arguments of a module's commands in the document."""
  blocks = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
  lines = [line for block in blocks for line in block.splitlines()]
  start = f"python -m sana_jax.tools.{module} "
  found = [line for line in lines if line.startswith(start)]
  return [shlex.split(line.removeprefix(start)) for line in found]


def test_the_table_lists_every_architecture_with_its_sizes():
  rows = table_rows()
  assert {row[1].strip("`") for row in rows} == set(recognition.PRESETS)
  for published, architecture, size, *checks in rows:
    assert published
    assert set(checks) <= {"equal", "no"}
    config = recognition.PRESETS[architecture.strip("`")]()
    if size:
      config.sample_size = int(size)
      assert recognition.architecture(config) == architecture.strip("`")


def test_the_table_names_everything_that_is_published():
  named = {name for row in table_rows() for name in row[0].split(", ")}
  published = {entry.name for entry in zoo.ENTRIES}
  published |= {c.repo.partition("/")[2] for c in zoo.CONTROLNETS}
  published |= {a.repo.partition("/")[2] for a in zoo.AUTOENCODERS}
  # The document says why it has no row.
  published.remove("Sana_Sprint_0.6B_1024px_teacher")
  assert "Sana_Sprint_0.6B_1024px_teacher" in TEXT
  assert named == published | {"gemma-2-2b-it"}
  for row in table_rows():
    for entry in filter(None, map(zoo.lookup, row[0].split(", "))):
      found = recognition.architecture(entry.make_config())
      assert found == row[1].strip("`"), entry.name
      assert entry.make_config().sample_size == int(row[2])


def test_the_commands_run(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(ROOT)
  for arguments in commands("inspect"):
    assert inspect.main(arguments) == 0
  layouts = []
  for arguments in commands("convert"):
    arguments = [a.replace("outputs", str(tmp_path)) for a in arguments]
    assert convert.main(arguments) == 0
    made = pathlib.Path(arguments[1])
    if (made / "transformer").is_dir():
      made = made / "transformer"
    layouts.append(opening.open_any(made).layout)
  assert layouts == ["original", "diffusers", "orbax"]
  assert "left out" not in capsys.readouterr().out


@pytest.mark.parity
@pytest.mark.parametrize(
  "options",
  [
    {"qk_norm": None},
    {"guidance_embeds": True, "patch_size": 2},
    {"interpolation_scale": 2.0, "num_layers": 3},
  ],
  ids=["plain", "sprint", "positions"],
)
def test_the_recipe_records_what_the_report_compares(tmp_path, capsys, options):
  pytest.importorskip("diffusers")
  (recipe,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
  config = tiny.transformer_config(**options)
  model = tiny.random_model(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0)), 0
  )
  components.save_transformer(tmp_path / "dir", model, config)
  recorded = tmp_path / "recorded.safetensors"
  exec(  # noqa: S102
    recipe, {"DIRECTORY": tmp_path / "dir", "RECORDED": recorded}
  )
  command = [str(recorded), f"--transformer={tmp_path / 'dir'}"]
  assert parity.main(command) == 0
  # A line for every layer, between the header and the verdict.
  names = parity.activations.names(config.num_layers)
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[0] for line in lines[1:-1]] == names
