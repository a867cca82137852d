"""Runs the reference cases of the autoencoder through the public API."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from sana_jax.models import tiling
from sana_jax.weights import components

Arrays = dict[str, np.ndarray]


def vae_case(
  case: Mapping[str, Any], inputs: Arrays, case_dir: pathlib.Path
) -> Arrays:
  """Computes the outputs of a case of kind `AutoencoderDC`.

  Args:
    case: the parsed `case.json`.
    inputs: its `in.*` tensors.
    case_dir: where the model's files are.
  """
  model, _ = components.load_autoencoder(case_dir)
  encode = _on_nchw(jax.jit(lambda model, x: model.encode(x)), model)
  decode = _on_nchw(jax.jit(lambda model, z: model.decode(z)), model)
  outputs = {}
  for name, value in inputs.items():
    name = name.removeprefix("in.")
    if name == "image":
      outputs["encode.latent"] = encode(value)
      outputs["roundtrip.sample"] = decode(outputs["encode.latent"])
    elif name == "latent":
      outputs["decode.sample"] = decode(value)
    elif name.startswith("image_"):
      outputs[f"encode_{name.removeprefix('image_')}.latent"] = encode(value)
  if "tiling" in case:
    outputs |= _tiled(case["tiling"], inputs, model)
  wanted = {name.removeprefix("out.") for name in case["tensors"]}
  return {f"out.{k}": v for k, v in outputs.items() if k in wanted}


def _tiled(sizes: dict[str, int], inputs: Arrays, model) -> Arrays:
  tiles = tiling.Tiling(
    tile_height=sizes["tile_sample_min_height"],
    tile_width=sizes["tile_sample_min_width"],
    stride_height=sizes["tile_sample_stride_height"],
    stride_width=sizes["tile_sample_stride_width"],
  )
  calls = {
    "tiled.encode.latent": (tiling.encode, "in.tiled.image"),
    "tiled.decode.sample": (tiling.decode, "in.tiled.latent"),
  }
  return {
    name: _on_nchw(jax.jit(functools.partial(function, tiling=tiles)), model)(
      inputs[source]
    )
    for name, (function, source) in calls.items()
    if source in inputs
  }


def _on_nchw(function, model):
  def call(x: np.ndarray) -> np.ndarray:
    y = function(model, x.transpose(0, 2, 3, 1))
    return np.asarray(y).transpose(0, 3, 1, 2)

  return call
