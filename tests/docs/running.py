"""Where the documents' commands are run, which are, and which only read."""

import json
import os
import pathlib
import re
import shlex
import shutil
import tempfile
from typing import NamedTuple

import numpy as np
import PIL.Image
import safetensors.numpy

from sana_jax.data import emoji
from sana_jax.weights import lora_files as lora
from tests import quick
from tests.docs import reading

BUNDLED = "sana_jax/assets/emoji_model"
CACHE = pathlib.Path(tempfile.gettempdir()) / "sana_jax_test_cache"

# Why commands are not run: what is sought in "PAGE: PROGRAM ARGUMENTS". Their
# flags and configs are read by the programs nevertheless.
NOT_RUN = {
  r"configs/(stages_)?sana(15)?_": "needs TPUs or GPUs",
  r"sana_jax\.plan ": "compiles for minutes; tests/plan, bench/plan.py",
  r"bench\.(memory|plan|tpu_aot) ": "compiles for a TPU; tests/bench",
  r"bench\.(sample|train|ops|startup) ": "times for minutes; tests/bench",
  r"_diffusers|=Sana_|=DIR .*--runner|sana_jax\.app ":
    "needs the hub, or Beam, or serves until it is stopped",
  r"RECORDED\.safetensors": "needs PyTorch; tests/docs/test_checkpoints_doc.py",
  r"checkpoints\.md: sana_jax\.tools\.(inspect|convert)": "run by "
  "tests/docs/test_checkpoints_doc.py",
  r"checkpoints\.md: sample\.py": "reads what those made",
  r"=runs/wide": "needs 8 devices; tests/test_train.py has such a run",
  r"emoji_model/README\.md: train|README\.md: train\.py .*=runs/emoji":
    "the same run as that of docs/first_steps.md, without its end",
  r"command_line\.md: .*=runs/emoji": "reads what that would make",
  r"docs/data\.md: (train\.py|.*--config=configs/folder)": "as in README.md",
  r"docs/data\.md: .*=sana_jax/assets/emoji_64": "the whole data set",
  r"^(README|docs/guides/command_line)\.md: sample\.py --reproduce":
    "as in docs/first_steps.md; that its picture is made is checked",
  r"tools\.(inspect DIR|convert SOURCE)": "as in docs/checkpoints.md",
}  # fmt: skip
# Of sampling: what the bundled model's own number is while they run.
STEPS = 2
# What makes them short. Nothing else about them is changed.
SHORTER = {
  r"train\.py .*configs/emoji": "--config.num_steps=2 --config.batch_size=2 "
  "--config.data.split=heldout",
  r"train\.py .*configs/(emoji|folder)\.py": "--config.sample_steps=2 "
  "--config.scan_layers=True",
  r"train\.py .*configs/folder": "--config.num_steps=2 --config.batch_size=2",
  r"emoji_retrieval": "--num_captions=2",
  r"bench\.data": "--seconds=0.2",
}
# Names that stand for something of the reader's.
SUBSTITUTES = {
  "--transformer=DIR": f"--transformer={BUNDLED}/transformer",
  "--checkpoint=DIR": f"--checkpoint={BUNDLED}",
  "--output_dir=sana_jax/assets/emoji_model/tokenizer": "--output_dir=made",
}
# It was examined, and something was found.
ALSO_FINE = {"sana_jax.tools.doctor": 1, "sana_jax.tools.parity": 1}
# Lines of shell that are other programs', and why they are not run.
OTHERS = {
  r"make (test|check|format|setup)": "this test is part of it",
  r"make (docs|docs-serve|figures)": "tests/docs/test_site.py",
  r"pip (install|wheel)|python3 -m (venv|uv)|git clone": "needs a network",
  r"curl ": "tests/docs/test_serving_doc.py",
  r"hf ": "needs the hub",
  r"gcloud|xpk|srun|#SBATCH|#!/bin/bash|cd sana_jax|--command|--accelerator":
    "needs a cloud or a cluster",
  r"V=|rm docs/plan": "belongs to what is not run",
}  # fmt: skip


class Plan(NamedTuple):
  """How a command is treated.

  Attributes:
    reason: why it is not run; None: it is.
    argv: what it is run with.
  """

  reason: str | None
  argv: tuple[str, ...]


def plan(command: reading.Command) -> Plan:
  text = str(command)
  for pattern, reason in NOT_RUN.items():
    if re.search(pattern, text):
      return Plan(reason, command.argv)
  argv = [SUBSTITUTES.get(word, word) for word in command.argv]
  for pattern, more in SHORTER.items():
    if re.search(pattern, text):
      argv += shlex.split(more)
  return Plan(None, tuple(argv))


def environment(root: pathlib.Path) -> dict[str, str]:
  """Returns that of a reader: one CPU device, compiled programs kept."""
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": quick.XLA_FLAGS,
    "PYTHONPATH": str(root),
    "JAX_COMPILATION_CACHE_DIR": str(CACHE),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
  }


def make_workspace(root: pathlib.Path) -> pathlib.Path:
  """Copies the repository to a new directory; puts a reader's files there."""
  for name in ("sana_jax", "configs", "bench", "docs", "notebooks"):
    if (reading.ROOT / name).exists():
      shutil.copytree(
        reading.ROOT / name,
        root / name,
        ignore=shutil.ignore_patterns("__pycache__"),
      )
  for name in ("train.py", "sample.py", "Makefile"):
    shutil.copy(reading.ROOT / name, root)
  settings = root / BUNDLED / "generation_config.json"
  fewer = json.loads(settings.read_text()) | {"num_inference_steps": STEPS}
  settings.write_text(json.dumps(fewer))
  (root / "pictures").mkdir()
  source = emoji.load("heldout")
  for i in range(8):
    record = source[i]
    picture = PIL.Image.fromarray(np.asarray(record["image"]))
    picture.save(root / "pictures" / f"{i}.png")
    (root / "pictures" / f"{i}.txt").write_text(record["name"])
  picture.save(root / "photo.png")
  mask = np.zeros((64, 64), np.uint8)
  mask[:, 32:] = 255
  PIL.Image.fromarray(mask).save(root / "mask.png")
  (root / "prompts.jsonl").write_text('{"prompt": "sunflower"}\n')
  write_lora(root / "style")
  write_parity_inputs(root / "inputs.safetensors")
  return root


def write_parity_inputs(path: pathlib.Path) -> None:
  """Writes what `tools.parity` takes as inputs of the bundled transformer."""
  rng = np.random.default_rng(0)
  safetensors.numpy.save_file(
    {
      "in.hidden_states": rng.standard_normal((1, 32, 4, 4), np.float32),
      "in.timestep": np.full((1,), 500, np.float32),
      "in.encoder_hidden_states": rng.standard_normal((1, 6, 192), np.float32),
    },
    path,
  )


def write_lora(path: pathlib.Path) -> None:
  """Writes an adapter of the bundled transformer."""
  rng = np.random.default_rng(0)
  down, up = (
    rng.standard_normal(shape).astype(np.float32)
    for shape in ((2, 256), (256, 2))
  )
  pairs = {"transformer_blocks.0.attn1.to_q": lora.Pair(down, up, 2.0)}
  path.mkdir()
  lora.save(path, lora.Lora(pairs))
