"""What is wrong with --config is said in one line."""

import subprocess
import sys

import pytest

# Parses every argument, cut at its spaces, as if it were alone, and prints how
# that exits.
COMMAND = """\
import sys
from sana_jax import config_flag

config = config_flag.define()
for arguments in sys.argv[1:]:
  path, *fields = arguments.split()
  sys.argv = ["it", f"--config={path}", *fields]
  try:
    config_flag.parser("it")(sys.argv)
    print(type(config.value).__name__)
  except SystemExit as end:
    print(end)
"""

FILES = {
  "wrong.py": "def get_config():\n  raise ValueError('no\\nmore')\n",
  "broken.py": "def get_config():\n  return 1 + 'a'\n",
  "missing.py": "def get_config():\n  return open('/nowhere')\n",
  "needs.py": "def get_config(hardware):\n  return hardware\n",
}

SAID = {
  "configs/sana_1600m_1024.py:v5e-256": "TextToImageConfig",
  "configs/sana_1600m_1024.py:v9-256": "it: --config: "
  "configs/sana_1600m_1024.py: hardware 'v9-256' is not a kind of chip",
  "configs/sana_1600m_1024.py:v5e-257": "it: --config: "
  "configs/sana_1600m_1024.py: 257 v5e do not hold the state",
  "configs/emoji.py:v5e-256": "it: --config: configs/emoji.py has no presets: "
  "leave out what follows the colon ('v5e-256')",
  "configs/sana_1600m_1024.py:v5-256": "it: --config: "
  "configs/sana_1600m_1024.py: hardware 'v5-256' is not a kind of chip",
  "configs/emogi.py": "it: --config: there is no file 'configs/emogi.py'. Did "
  "you mean 'configs/emoji.py'",
  "configs/emoji.py --config.batchsize=32": "it: --config: TextToImageConfig "
  "has no field 'batchsize'. Did you mean 'batch_size' or ",
  "configs/emoji.py --noconfig.optim.lr": "it: --config: TextToImageConfig "
  "has no field 'optim.lr'. Did you mean 'optim.peak_lr' or ",
  "configs/emoji.py --config.seed=1 --config.batch-size=1": "it: --config: "
  "TextToImageConfig has no field 'batch-size'. Did you mean 'batch_size' or ",
  "configs/emoji.py --config.mesh.fspd=1": "it: --config: TextToImageConfig "
  "has no field 'mesh.fspd'. Did you mean 'mesh.fsdp' or ",
  "configs/emoji.py --config.seed.x=1": "it: --config: TextToImageConfig "
  "has no field 'seed.x'.",
  "configs/emoji.py --config.data.sources[3].path=x": "it: --config: "
  "TextToImageConfig has no field 'data.sources[3].path'.",
  "configs/stages_sana_1600m.py:v5e-256 --config.stages.px51.batch_size=1": (
    "it: --config: StagesConfig has no field 'stages.px51.batch_size'. Did you "
    "mean 'stages.px512.batch_size' or "
  ),
  "{}/wrong.py": "it: --config: {}/wrong.py: no more",
  "{}/broken.py": "it: --config: {}/broken.py, line 2: unsupported operand",
  "{}/missing.py": "it: --config: {}/missing.py: [Errno 2] No such file",
  "{}/needs.py": "it: --config: {}/needs.py wants a preset, as in {}/needs.py:",
}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
  folder = tmp_path_factory.mktemp("configs")
  for name, text in FILES.items():
    (folder / name).write_text(text)
  paths = [path.replace("{}", str(folder)) for path in SAID]
  done = subprocess.run(
    [sys.executable, "-c", COMMAND, *paths],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.replace(str(folder), "{}").splitlines()
  return dict(zip(SAID, lines, strict=True))


@pytest.mark.parametrize("path", SAID)
def test_one_line_says_what_is_wrong(said, path):
  assert said[path].startswith(SAID[path])
