"""What the documents say to type runs, as a reader types it.

Each page has a directory of its own, a copy of the repository with a few of a
reader's files, in which its commands run in their order, and then its Python.
`running.py` says what is not run, and why, and what makes the rest short.
"""

import json
import re
import subprocess
import sys

import pytest

from tests.docs import reading, running

pytestmark = pytest.mark.docs

# What a page takes for granted, before its first block of Python.
_PIPE = """
import sana_jax
pipe = sana_jax.SanaPipeline.from_pretrained(sana_jax.bundled_checkpoint())
"""
PREAMBLES = {
  "README.md": """
import PIL.Image
photo, mask = PIL.Image.open("photo.png"), PIL.Image.open("mask.png")
my_score = lambda images, prompts: images.mean((1, 2, 3))
""",
  "docs/memory.md": _PIPE + "from sana_jax.pipeline import memory\n",
  "docs/data.md": """
from sana_jax import config as config_lib
config = config_lib.TextToImageConfig()
""",
}
# What the bundled model and cache have in place of what a page shows.
REPLACED = {
  '"Sana_1600M_1024px_BF16"': "sana_jax.bundled_checkpoint()",
  "image_size=1024, max_sequence_length=300": "image_size=64",
  # As the commands: tests/docs/running.py.
  "num_inference_steps=20": f"num_inference_steps={running.STEPS}",
  ".schedule(20)": f".schedule({running.STEPS})",
  ".schedule(10)": f".schedule({running.STEPS})",
}
# Those need PyTorch, these a server: test_checkpoints_doc, test_serving_doc.
PYTHON_NOT_RUN = ("docs/checkpoints.md", "docs/serving.md")

COMMANDS = {
  reading.name(page): list(reading.commands(page)) for page in reading.PAGES
}


def python(page: str) -> str:
  blocks = reading.blocks(reading.ROOT / page)
  source = "\n".join(b.text for b in blocks if b.language == "python")
  if not source or page in PYTHON_NOT_RUN:
    return ""
  for shown, had in REPLACED.items():
    source = source.replace(shown, had)
  return PREAMBLES.get(page, "") + source


def to_run(page: str) -> list[reading.Command]:
  return [c for c in COMMANDS[page] if running.plan(c).reason is None]


@pytest.mark.parametrize(
  "page", [page for page in COMMANDS if to_run(page) or python(page)]
)
def test_commands_and_python_of_a_page_run(page, tmp_path):
  root = running.make_workspace(tmp_path)
  blocks = reading.blocks(reading.ROOT / page)
  for block in blocks:
    if block.language == "json":
      (root / "prompts.jsonl").write_text(block.text)
  if any(b.text.startswith("make demo") for b in blocks):
    binaries = sys.prefix + "/bin"
    run(root, ["make", "--assume-old=setup", "demo", f"BIN={binaries}"])
  for command in to_run(page):
    program = [command.program]
    if not command.program.endswith(".py"):
      program = ["-m", command.program]
    fine = {0, running.ALSO_FINE.get(command.program, 0)}
    argv = running.plan(command).argv
    run(root, [sys.executable, *program, *argv], fine=fine)
  for command in COMMANDS[page]:
    for word in command.argv:
      if word.startswith("--reproduce="):
        assert (root / word.removeprefix("--reproduce=")).is_file(), command
  if source := python(page):
    run(root, [sys.executable, "-c", source])


def run(root, argv, fine=frozenset({0})) -> None:
  result = subprocess.run(
    argv,
    cwd=root,
    env=running.environment(root),
    capture_output=True,
    text=True,
    check=False,
  )
  said = result.stdout[-2000:] + result.stderr[-4000:]
  assert result.returncode in fine, f"{argv}\n{said}"


def test_what_is_not_run_has_flags_that_the_programs_read(tmp_path):
  root = running.make_workspace(tmp_path)
  found = [c for commands in COMMANDS.values() for c in commands]
  read = [c for c in found if running.plan(c).reason is not None]
  result = subprocess.run(
    [sys.executable, reading.ROOT / "tests/docs/read_flags.py"],
    input=json.dumps([[c.program, *c.argv] for c in read]),
    cwd=root,
    env=running.environment(root),
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr[-4000:]
  said = json.loads(result.stdout)
  wrong = {str(c): s for c, s in zip(read, said, strict=True) if s}
  assert not wrong


def test_every_reason_for_not_running_is_needed():
  found = [str(c) for commands in COMMANDS.values() for c in commands]
  for pattern in (*running.NOT_RUN, *running.SHORTER):
    assert any(re.search(pattern, text) for text in found), pattern
