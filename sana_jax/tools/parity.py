"""Compares all layers: python -m sana_jax.tools.parity RECORDED [...].

Runs a transformer on recorded inputs, and prints for every recorded layer the
relative error ||ours - recorded|| / ||recorded||, in the order of the forward
pass. The first layer that diverges is named; the exit code is then 1, and 2
when there is nothing to compare.

RECORDED is a safetensors file, used with --transformer, or a directory with
such a file as reference.safetensors, a transformer's files beside it, and
perhaps a case.json, from which the float32 floor is read (the rounding error of
the recording itself). Tensors in the file, all channels first as in PyTorch:

  in.hidden_states            latents, [batch, channels, height, width]
  in.timestep                 [batch]
  in.encoder_hidden_states    text states, [batch, tokens, channels]
  in.encoder_attention_mask   optional, [batch, tokens], 1 is kept
  in.guidance                 SANA-Sprint only, [batch]
  out.inter.NAME              output of a layer, see below
  out.sample                  output of the network

NAME is patch_embed, time_embed.embedded, time_embed.modulation,
caption_projection, caption_norm, norm_out, proj_out, and for every block i
block<i>, block<i>.attn1, block<i>.attn2 and block<i>.ff, each what the PyTorch
module of that name returns; [batch, tokens, channels], for ff an image. Any
subset will do. A file with several runs has their names after the in. and out.
(in.main.timestep); inputs without a run serve all. docs/checkpoints.md shows
how to record such a file with PyTorch.
"""

import argparse
import math
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from sana_jax import devices
from sana_jax.models import sana
from sana_jax.tools import activations
from sana_jax.weights import components, files

Arrays = dict[str, np.ndarray]

_REFERENCE = "reference.safetensors"
# 10 floors: two float32 computations differ by a few times their own errors.
_FLOORS = 10


class Layer(NamedTuple):
  """One line of the report.

  Attributes:
    error: relative to the norm of the recorded output.
    floor: of the recording, where it is known.
    diverges: beyond the tolerance and ten floors.
  """

  name: str
  error: float
  floor: float | None
  diverges: bool


class Recording(NamedTuple):
  """Inputs and outputs of one run, names without prefixes.

  Attributes:
    prefix: "main." for the run main, else empty.
  """

  prefix: str
  inputs: Arrays
  outputs: Arrays
  floors: dict[str, float]


def read_recording(path: str | pathlib.Path, run: str | None) -> Recording:
  """Reads one run of a recording.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: several runs and no choice, or inputs are missing.
  """
  path = pathlib.Path(path)
  directory = path if path.is_dir() else path.parent
  file = path / _REFERENCE if path.is_dir() else path
  if not file.is_file():
    raise FileNotFoundError(f"{file} does not exist.")
  tensors = files.open_safetensors(file)
  run = _choose_run(tensors, run, file)
  prefix = f"{run}." if run else ""
  inputs = _under(tensors, f"in.{prefix}") or _under(tensors, "in.")
  outputs = {
    name.removeprefix("inter."): value
    for name, value in _under(tensors, f"out.{prefix}").items()
    if name.startswith("inter.") or name == "sample"
  }
  needed = ("hidden_states", "timestep", "encoder_hidden_states")
  if missing := [name for name in needed if name not in inputs]:
    raise ValueError(f"{file} lacks {[f'in.{prefix}{n}' for n in missing]}.")
  floors = {}
  if path.is_dir() and (directory / "case.json").is_file():
    described = files.read_json(directory / "case.json").get("tensors", {})
    for name in outputs:
      inter = "" if name == "sample" else "inter."
      entry = described.get(f"out.{prefix}{inter}{name}", {})
      if entry.get("fp32_floor") is not None:
        floors[name] = entry["fp32_floor"]
  return Recording(prefix, inputs, outputs, floors)


def run(
  model: sana.SanaTransformer, inputs: Mapping[str, np.ndarray]
) -> Arrays:
  """Returns all layers' outputs in the layout of recordings, in order."""
  mask = inputs.get("encoder_attention_mask")
  guidance = inputs.get("guidance")
  with jax.default_matmul_precision("highest"):
    found = jax.jit(activations.compute)(
      model,
      jnp.asarray(np.moveaxis(inputs["hidden_states"], 1, -1)),
      jnp.asarray(inputs["timestep"]),
      jnp.asarray(inputs["encoder_hidden_states"]),
      None if mask is None else jnp.asarray(mask != 0),
      guidance=None if guidance is None else jnp.asarray(guidance),
    )
  # A jitted function sorts the keys of a dictionary.
  return {
    name: _channels_first(np.asarray(found[name], np.float32))
    for name in activations.names(activations.num_layers(model))
  }


def compare(
  ours: Arrays, recording: Recording, tolerance: float
) -> list[Layer]:
  """Compares layer by layer, in the order of `ours`.

  Raises:
    ValueError: nothing is recorded, or something that the network lacks or has
      in another shape.
  """
  recorded = recording.outputs
  problems = [f"unknown {name}" for name in recorded if name not in ours]
  problems += [
    f"{name} has shape {recorded[name].shape}, here {ours[name].shape}"
    for name in ours
    if name in recorded and recorded[name].shape != ours[name].shape
  ]
  if problems or not recorded:
    raise ValueError(
      "The recording does not fit the transformer: "
      + "; ".join(problems or ["it has no outputs"])
    )
  layers = []
  for name in ours:
    if name not in recorded:
      continue
    error = _relative_error(ours[name], recorded[name])
    floor = recording.floors.get(name)
    allowed = max(tolerance, _FLOORS * (floor or 0.0))
    # Written so that NaN diverges.
    layers.append(Layer(name, error, floor, not error <= allowed))
  return layers


def table(layers: Sequence[Layer], tolerance: float) -> Iterator[str]:
  """Yields the report as text."""
  width = max(len(layer.name) for layer in layers)
  yield f"{'layer':<{width}}  {'error':>8}  {'floor':>8}"
  for layer in layers:
    floor = "-" if layer.floor is None else f"{layer.floor:.1e}"
    mark = "  diverges" if layer.diverges else ""
    yield f"{layer.name:<{width}}  {layer.error:8.1e}  {floor:>8}{mark}"
  first = next((layer for layer in layers if layer.diverges), None)
  if first is None:
    yield f"no layer diverges by more than {tolerance:g}"
  else:
    yield f"first to diverge: {first.name}, by {first.error:.1e}"


def record(path: str | pathlib.Path, inputs: Arrays, outputs: Arrays) -> None:
  """Writes a recording, to be compared with elsewhere."""
  tensors = {f"in.{name}": value for name, value in inputs.items()}
  for name, value in outputs.items():
    inter = "" if name == "sample" else "inter."
    tensors[f"out.{inter}{name}"] = value
  contiguous = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
  safetensors.numpy.save_file(contiguous, path)


def make_parser() -> argparse.ArgumentParser:
  """Returns the parser of the command's arguments."""
  parser = argparse.ArgumentParser(
    prog="python -m sana_jax.tools.parity",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("recorded", help="a safetensors file, or a directory")
  parser.add_argument(
    "--transformer",
    help="a transformer in any layout; default: the directory RECORDED",
  )
  parser.add_argument("--variant", help="of the transformer's weights")
  parser.add_argument("--run", help="needed when several are recorded")
  parser.add_argument(
    "--tolerance", type=float, default=1e-4, help="relative; default 1e-4"
  )
  parser.add_argument(
    "--dtype",
    choices=("float32", "bfloat16"),
    default="float32",
    help="of the computation here; default float32",
  )
  parser.add_argument(
    "--record",
    metavar="OUT",
    help="compare nothing; write the inputs and all layers here to this file",
  )
  return parser


def main(argv: Sequence[str]) -> int:
  args = make_parser().parse_args(argv)
  try:
    devices.check()
    return _main(args)
  except (OSError, ValueError) as error:
    sys.stderr.write(f"parity: {error}\n")
    return 2


def _main(args: argparse.Namespace) -> int:
  recording = read_recording(args.recorded, args.run)
  model, _ = components.load_transformer(
    args.transformer or args.recorded, variant=args.variant, dtype=args.dtype
  )
  ours = run(model, recording.inputs)
  if args.record:
    record(args.record, recording.inputs, ours)
    sys.stdout.write(f"{args.record}\n")
    return 0
  layers = compare(ours, recording, args.tolerance)
  sys.stdout.write("\n".join(table(layers, args.tolerance)) + "\n")
  return int(any(layer.diverges for layer in layers))


def _choose_run(
  tensors: Mapping[str, Any], run: str | None, file: pathlib.Path
) -> str:
  pattern = re.compile(r"out\.(?:([^.]+)\.)?(inter\..+|sample)")
  matches = [match for name in tensors if (match := pattern.fullmatch(name))]
  runs = {match[1] or "" for match in matches}
  # Runs with layers are what this is for, among runs with outputs only.
  detailed = {match[1] or "" for match in matches if match[2] != "sample"}
  if run is not None and run not in runs:
    raise ValueError(f"{file} has no run {run!r}; it has {sorted(runs)}.")
  choices = {run} if run is not None else detailed or runs or {""}
  if len(choices) > 1:
    raise ValueError(
      f"{file} has the runs {sorted(choices)}; choose one with --run."
    )
  return choices.pop()


def _under(tensors: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  return {
    name.removeprefix(prefix): np.asarray(value)
    for name, value in tensors.items()
    if name.startswith(prefix)
  }


def _channels_first(x: np.ndarray) -> np.ndarray:
  return np.moveaxis(x, -1, 1) if x.ndim == 4 else x


def _relative_error(ours: np.ndarray, recorded: np.ndarray) -> float:
  recorded = recorded.astype(np.float64)
  error, norm = np.linalg.norm(ours - recorded), np.linalg.norm(recorded)
  if norm == 0:
    return 0.0 if error == 0 else math.inf
  return float(error / norm)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
