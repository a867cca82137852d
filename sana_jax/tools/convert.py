"""Converts checkpoints: python -m sana_jax.tools.convert SOURCE TARGET --to=...

SOURCE is a component (a directory, or a .safetensors or .pth file) or a whole
pipeline directory, in any layout; TARGET is a new directory. Layouts:

  diffusers  config.json and diffusion_pytorch_model.safetensors
  original   config.json and model.safetensors, with the names of the original
             .pth and DC-AE files; only the parameters of the network
  orbax      config.json and params/, with our names, blocks stacked

This project reads all three everywhere. In a pipeline, the text encoder stays
in its one published layout under --to=original. Values are exact unless --dtype
changes them. TARGET appears when it is complete, or not at all.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from etils import epath

from sana_jax.weights import files, opening, orbax_files, translation

LAYOUTS = ("diffusers", "original", "orbax")
_DTYPES = {
  "float32": np.dtype(np.float32),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
  "float16": np.dtype(np.float16),
}
_INDEX = "model_index.json"
_COMPONENTS = ("text_encoder", "transformer", "vae")


def convert(
  source: epath.PathLike,
  target: epath.PathLike,
  *,
  to: str,
  dtype: str | None = None,
  variant: str | None = None,
  config_file: epath.PathLike | None = None,
) -> list[str]:
  """Writes a component or a pipeline in another layout.

  Args:
    to: one of `LAYOUTS`.
    dtype: "float32", "bfloat16" or "float16"; None keeps each tensor's.
    variant: such as "fp16", for the components that have it.
    config_file: None reads the config beside the weights.

  Returns:
    The names of the tensors that the layout has no place for.

  Raises:
    FileExistsError: there is something at `target`.
    FileNotFoundError: something is missing.
    ValueError: something is unreadable, or does not fit its architecture.
  """
  source, target = epath.Path(source), epath.Path(target)
  if target.exists():
    raise FileExistsError(f"{target} exists; give a new directory.")
  partial = target.parent / f"{target.name}.partial-{os.getpid()}"
  target.parent.mkdir(parents=True, exist_ok=True)
  try:
    if (source / _INDEX).is_file():
      if config_file is not None:
        raise ValueError("A pipeline's components have their own configs.")
      left_out = _pipeline(source, partial, to, dtype, variant)
    else:
      left_out = _component(source, partial, to, dtype, variant, config_file)
    partial.rename(target)
  finally:
    if partial.exists():
      partial.rmtree()
  return left_out


def _pipeline(source, target, to, dtype, variant) -> list[str]:
  present = {name: files.variants(source / name) for name in _COMPONENTS}
  if variant is not None and not any(variant in v for v in present.values()):
    raise FileNotFoundError(
      f"No component of {source} has weights of variant {variant!r}."
    )
  left_out = []
  for name in _COMPONENTS:
    chosen = variant if variant in present[name] else None
    layout = "diffusers" if (name, to) == ("text_encoder", "original") else to
    left_out += [
      f"{name}: {tensor}"
      for tensor in _component(
        source / name, target / name, layout, dtype, chosen, None
      )
    ]
  for path in source.iterdir():
    if path.is_file():
      path.copy(target / path.name)
    elif path.name not in _COMPONENTS:
      _copy_directory(path, target / path.name)
  return left_out


def _component(source, target, to, dtype, variant, config_file) -> list[str]:
  component = opening.open_any(source, config_file=config_file, variant=variant)
  tensors = translation.translate(
    component.abstract(),
    component.tensors,
    component.rules,
    opening.rules_of(component, to),
    ignore=component.ignored,
    dtype=None if dtype is None else _DTYPES[dtype],
    source_name=str(source),
  )
  config = opening.config_json(component.config)
  if to == "orbax":
    orbax_files.write_component(target, config, tensors)
  else:
    published = component.kind != "text_encoder" and to == "diffusers"
    stem = "diffusion_pytorch_model" if published else "model"
    files.write_component(target, config, tensors, stem=stem)
  pattern = "|".join(f"(?:{regex})" for regex in component.ignored) or r"(?!)"
  return [n for n in component.tensors if re.fullmatch(pattern, n)]


def _copy_directory(source: epath.Path, target: epath.Path) -> None:
  target.mkdir(parents=True, exist_ok=True)
  for path in source.iterdir():
    if path.is_dir():
      _copy_directory(path, target / path.name)
    else:
      path.copy(target / path.name)


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's arguments."""
  parser = argparse.ArgumentParser(
    prog="python -m sana_jax.tools.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("source", help="a component or a pipeline directory")
  parser.add_argument("target", help="a directory that does not exist yet")
  parser.add_argument("--to", required=True, choices=LAYOUTS)
  parser.add_argument(
    "--dtype", choices=sorted(_DTYPES), help="default: as stored"
  )
  parser.add_argument("--variant", help="of the weights to read, e.g. fp16")
  parser.add_argument(
    "--config", help="config.json of a SOURCE that has none beside it"
  )
  return parser


def main(argv: Sequence[str]) -> int:
  args = make_parser().parse_args(argv)
  try:
    left_out = convert(
      args.source,
      args.target,
      to=args.to,
      dtype=args.dtype,
      variant=args.variant,
      config_file=args.config,
    )
  except (OSError, ValueError) as error:
    sys.stderr.write(f"convert: {error}\n")
    return 1
  sys.stdout.write(f"{args.target}\n")
  if left_out:
    sys.stdout.write(f"left out, not parameters: {', '.join(left_out)}\n")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
