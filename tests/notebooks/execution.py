"""Runs the notebooks: python -m tests.notebooks.execution [NAME ...].

Writes each .ipynb anew, from its .py and with what running it shows, and says
what that took. Needs the extra `notebooks`.
"""

import base64
import io
import os
import pathlib
import resource
import sys
import tempfile
import time
from typing import Any

import jupytext
import nbclient
import nbformat
import PIL.Image

from tests.notebooks import pairs

TIMEOUT = 900  # seconds, of a cell; loaded machines are slow
CACHE = pathlib.Path(tempfile.gettempdir()) / "sana_jax_test_cache"
ROOT = pathlib.Path(__file__).parents[2]
# What makes training shorter, for tests, which look at no pictures. What is
# stored comes of whole runs.
SHORTER = {
  "folder_to_fine_tune": {
    "num_steps=80": "num_steps=8",
    "warmup_steps=20": "warmup_steps=2",
    "every=20, keep=4": "every=2, keep=4",
    "sample_every=80": "sample_every=8",
    "(20, 40, 80)": "(2, 4, 8)",
    "log_every=5": "log_every=1",
  },
  "train_tiny": {
    "num_steps=160": "num_steps=16",
    '"num_steps": 320': '"num_steps": 32',
    "warmup_steps=20": "warmup_steps=2",
    "(every=80)": "(every=8)",
    "sample_every=80": "sample_every=8",
  },
  "your_own_loss_and_sampler": {
    "num_steps=160": "num_steps=20",
    "warmup_steps=20": "warmup_steps=2",
    "(every=160)": "(every=20)",
    "sample_every=160": "sample_every=20",
    "step_0000160.png": "step_0000020.png",
    "log_every=5": "log_every=1",
  },
}
METADATA = {
  "kernelspec": {
    "display_name": "Python 3",
    "language": "python",
    "name": "python3",
  },
  "language_info": {"name": "python"},
}


def read_text(path: pathlib.Path) -> Any:
  """Returns a text as a notebook without outputs, the same every time."""
  notebook = jupytext.read(path, fmt="py:percent")
  notebook.metadata = nbformat.from_dict(METADATA)
  for number, cell in enumerate(notebook.cells):
    cell.id = f"cell-{number:02d}"
    cell.metadata = {}
  return notebook


def shorten(notebook: Any, name: str) -> None:
  """Makes the runs of a notebook shorter, in place.

  Raises:
    ValueError: what is to be replaced is not there once.
  """
  for whole, short in SHORTER.get(name, {}).items():
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    found = [cell for cell in cells if whole in cell.source]
    if len(found) != 1 or found[0].source.count(whole) != 1:
      raise ValueError(f"{name} has {whole!r} not once: mend SHORTER.")
    found[0].source = found[0].source.replace(whole, short)


def execute(notebook: Any, xla_flags: str = "") -> None:
  """Runs all cells in a fresh kernel, and keeps their outputs.

  What they write is gone afterwards.

  Args:
    xla_flags: the kernel's XLA_FLAGS. A reader's machine has one device, not
      the eight of the tests.

  Raises:
    nbclient.exceptions.CellExecutionError: a cell raised something.
  """
  with tempfile.TemporaryDirectory() as directory:
    environment = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(CACHE),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
      "PYTHONPATH": str(ROOT),
      "TMPDIR": directory,
      "TQDM_DISABLE": "1",
      "XLA_FLAGS": xla_flags,
    }
    client = nbclient.NotebookClient(
      notebook,
      timeout=TIMEOUT,
      kernel_name="python3",
      record_timing=False,
      resources={"metadata": {"path": directory}},
    )
    client.execute(env=environment)
  # The kernel adds what version of Python it is.
  notebook.metadata = nbformat.from_dict(METADATA)


def shrink(notebook: Any) -> None:
  """Stores pictures with 256 colours: they are there to be looked at."""
  for output in pairs.outputs(notebook):
    data = output.get("data", {})
    if "image/png" in data:
      picture = PIL.Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
      buffer = io.BytesIO()
      picture.convert("RGB").quantize(256).save(buffer, "PNG", optimize=True)
      data["image/png"] = base64.b64encode(buffer.getvalue()).decode()


def main(names: list[str]) -> None:
  for path in pairs.TEXTS:
    if names and path.stem not in names:
      continue
    notebook = read_text(path)
    start = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    execute(notebook)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(
      getattr(after, name) - getattr(before, name)
      for name in ("ru_utime", "ru_stime")
    )
    shrink(notebook)
    nbformat.write(notebook, path.with_suffix(".ipynb"))
    size = path.with_suffix(".ipynb").stat().st_size
    sys.stdout.write(
      f"{path.stem}: {cpu:.0f} s of CPU time, "
      f"{time.monotonic() - start:.0f} s in all, {size // 1000} kB\n"
    )


if __name__ == "__main__":
  main(sys.argv[1:])
