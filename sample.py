"""Makes images: python sample.py --prompt="a red apple" [--checkpoint=DIR].

Without --checkpoint, the small emoji model that comes with the package. PNG
files carry everything needed to make them again.
"""

import hashlib
import importlib.metadata
import json
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from etils import epath

from sana_jax import images as images_lib
from sana_jax import pipeline as pipeline_lib
from sana_jax.models import tiling

_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; repeatable.")
_PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "One prompt a line.")
_NEGATIVE = flags.DEFINE_string(
  "negative_prompt", "", "What to stay away from."
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Directory in the layout of diffusers."
)
_VARIANT = flags.DEFINE_string("variant", None, "Weights variant, e.g. fp16.")
_STEPS = flags.DEFINE_integer(
  "num_inference_steps", None, "None: the checkpoint's own, like below."
)
_GUIDANCE = flags.DEFINE_float("guidance_scale", None, "1 and below: none.")
_HEIGHT = flags.DEFINE_integer("height", None, "In pixels.")
_WIDTH = flags.DEFINE_integer("width", None, "In pixels.")
_BINNING = flags.DEFINE_boolean(
  "use_resolution_binning", None, "Generate at the closest trained size."
)
_TILE = flags.DEFINE_integer(
  "vae_tile", None, "Decode in tiles of so many pixels, for 4K images."
)
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same images.")
_COUNT = flags.DEFINE_integer("num_images_per_prompt", 1, "Images a prompt.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images at a time.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Of weights and computation."
)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "outputs", "For PNG files.")
_GRID = flags.DEFINE_boolean("grid", False, "Write grid.png of all images too.")
_OVERWRITE = flags.DEFINE_boolean("overwrite", False, "Replace old files.")

_SLUG_LENGTH = 60
_HASH_CHUNK = 1 << 24


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  logging.set_verbosity(logging.INFO)
  warnings.showwarning = _log_warning
  try:
    for path in run():
      sys.stdout.write(f"{path}\n")
  except (ValueError, OSError, FloatingPointError) as error:
    _fail(str(error))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _fail("Out of device memory; lower --batch_size, or use --dtype=bfloat16.")


def run() -> list[epath.Path]:
  """Makes what the flags ask for; returns the files written."""
  prompts = [prompt for prompt in read_prompts() for _ in range(_COUNT.value)]
  paths = plan_files(prompts)
  checkpoint = checkpoint_path()
  pipe = pipeline_lib.SanaPipeline.from_pretrained(
    checkpoint, dtype=_DTYPE.value, variant=_VARIANT.value
  )
  if _TILE.value is not None:
    pipe.tiling = square_tiles(_TILE.value)
  images = generate(pipe, prompts)
  description = describe(pipe, checkpoint)
  for i, prompt in enumerate(prompts):
    metadata = png_metadata(
      {"prompt": prompt, "image_index": i, **description}, images[i].shape
    )
    images_lib.write_png(paths[i], images[i], metadata=metadata)
  if _GRID.value:
    columns = _COUNT.value if _COUNT.value > 1 else None
    grid = images_lib.grid(images, columns=columns)
    metadata = {"sana_jax": json.dumps({"prompts": prompts, **description})}
    images_lib.write_png(paths[-1], grid, metadata=metadata)
  return paths


def read_prompts() -> list[str]:
  """Collects the prompts of both flags."""
  if _COUNT.value < 1 or _BATCH_SIZE.value < 1:
    raise ValueError(
      f"--num_images_per_prompt ({_COUNT.value}) and --batch_size "
      f"({_BATCH_SIZE.value}) must be at least 1."
    )
  prompts = list(_PROMPT.value)
  if _PROMPT_FILE.value:
    path = epath.Path(_PROMPT_FILE.value)
    if not path.is_file():
      raise FileNotFoundError(f"--prompt_file {path} does not exist.")
    lines = path.read_text().splitlines()
    prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
      raise ValueError(
        f"--prompt_file {path} is empty; put a prompt on a line."
      )
  if not prompts:
    raise ValueError("There is no prompt; give --prompt or --prompt_file.")
  return prompts


def plan_files(prompts: Sequence[str]) -> list[epath.Path]:
  """Names the files, and makes sure that none would be lost."""
  directory = epath.Path(_OUTPUT_DIR.value)
  paths = [
    directory / f"{i:04d}-{slug(prompt)}.png"
    for i, prompt in enumerate(prompts)
  ]
  if _GRID.value:
    paths.append(directory / "grid.png")
  existing = [path for path in paths if path.exists()]
  if existing and not _OVERWRITE.value:
    raise FileExistsError(
      f"{existing[0]} exists; use another --output_dir, or --overwrite."
    )
  directory.mkdir(parents=True, exist_ok=True)
  return paths


def checkpoint_path() -> epath.Path:
  """Returns --checkpoint, or the model that comes with the package."""
  if _CHECKPOINT.value is None:
    return pipeline_lib.bundled_checkpoint()
  return epath.Path(_CHECKPOINT.value)


def square_tiles(side: int) -> tiling.Tiling:
  """Returns tiles that overlap by an eighth, as published pipelines do."""
  stride = side * 7 // 8
  return tiling.Tiling(
    tile_height=side,
    tile_width=side,
    stride_height=stride,
    stride_width=stride,
  )


def generate(
  pipe: pipeline_lib.SanaPipeline, prompts: Sequence[str]
) -> list[np.ndarray]:
  """Makes one image per prompt, `--batch_size` at a time."""
  size = min(_BATCH_SIZE.value, len(prompts))
  images: list[np.ndarray] = []
  for start in range(0, len(prompts), size):
    batch = list(prompts[start : start + size])
    used = len(batch)
    # Filled up, so that the last batch needs no compilation of its own.
    batch += batch[-1:] * (size - used)
    logging.info("images %d to %d of %d", start, start + used - 1, len(prompts))
    output = pipe(
      batch,
      negative_prompt=_NEGATIVE.value,
      seed=_SEED.value,
      image_index=start,
      progress=_log_progress,
      **_changes(),
    )
    images += list(output.images[:used])
  return images


def describe(
  pipe: pipeline_lib.SanaPipeline, checkpoint: epath.Path
) -> dict[str, Any]:
  """Collects what, besides prompt and index, determines an image."""
  return {
    "negative_prompt": _NEGATIVE.value,
    "seed": _SEED.value,
    **pipe.generation_config.replace(_changes()).to_dict(),
    "solver": type(pipe.solver).__name__,
    "dtype": _DTYPE.value,
    "checkpoint": checkpoint.absolute().name,
    "checkpoint_sha256": checkpoint_hash(checkpoint),
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "sana_jax": importlib.metadata.version("sana_jax"),
  }


def png_metadata(
  description: dict[str, Any], shape: tuple[int, ...]
) -> dict[str, str]:
  """Makes text chunks: JSON, and the line format of other image tools."""
  negative = description["negative_prompt"]
  parameters = [
    description["prompt"],
    *([f"Negative prompt: {negative}"] if negative else []),
    f"Steps: {description['num_inference_steps']}, "
    f"Sampler: {description['solver']}, "
    f"CFG scale: {description['guidance_scale']}, "
    f"Seed: {description['seed']}, Size: {shape[1]}x{shape[0]}, "
    f"Model hash: {description['checkpoint_sha256'][:10]}, "
    f"Model: {description['checkpoint']}, "
    f"Version: sana_jax {description['sana_jax']}",
  ]
  return {
    "parameters": "\n".join(parameters),
    "prompt": description["prompt"],
    "seed": str(description["seed"]),
    "sana_jax": json.dumps(description, ensure_ascii=False),
  }


def checkpoint_hash(checkpoint: epath.Path) -> str:
  """Returns the SHA-256 of all weight files, in the order of their names."""
  digest = hashlib.sha256()
  for path in sorted(checkpoint.glob("*/*.safetensors")):
    with path.open("rb") as file:
      while chunk := file.read(_HASH_CHUNK):
        digest.update(chunk)
  return digest.hexdigest()


def slug(prompt: str) -> str:
  """Makes a prompt a file name: lower case letters and digits, hyphens."""
  words = re.findall(r"[^\W_]+", prompt.lower())
  return "-".join(words)[:_SLUG_LENGTH].strip("-") or "image"


def _changes() -> dict[str, Any]:
  return {
    "num_inference_steps": _STEPS.value,
    "guidance_scale": _GUIDANCE.value,
    **{
      name: value
      for name, value in (
        ("height", _HEIGHT.value),
        ("width", _WIDTH.value),
        ("use_resolution_binning", _BINNING.value),
      )
      if value is not None
    },
  }


def _log_progress(event: pipeline_lib.Progress) -> None:
  if event.seconds is not None:
    done = "compiled" if event.phase == "compile" else "ran"
    logging.info("%s: %s in %.1f s", event.stage, done, event.seconds)


def _log_warning(message, *_args, **_kwargs) -> None:
  logging.warning("%s", message)


def _fail(message: str) -> None:
  sys.stderr.write(f"sample.py: {message}\n")
  sys.exit(1)


if __name__ == "__main__":
  app.run(main)
