"""ControlNet reference cases, computed with the public API."""

import pathlib

import jax
import numpy as np

from sana_jax.models import controlnet as controlnet_lib
from sana_jax.weights import components

Arrays = dict[str, np.ndarray]


def controlnet_case(
  case: dict, inputs: Arrays, case_dir: pathlib.Path
) -> Arrays:
  """Returns every `out.` tensor that `case["tensors"]` names.

  Args:
    case: the contents of case.json.
    inputs: the `in.` tensors, with their prefix.
    case_dir: where the transformer and the control branch are.
  """
  transformer, _ = components.load_transformer(case_dir / "transformer")
  controlnet = _load(case_dir)
  wanted = [name for name in case["tensors"] if name.startswith("out.")]
  outputs = {}
  for run in {name.removesuffix("sample") for name in wanted} - set(wanted):
    prefix = run.replace("out.", "in.", 1)
    mine = {
      name.removeprefix(prefix): value
      for name, value in inputs.items()
      if name.startswith(prefix)
    }
    residuals, sample = jax.jit(_both)(
      controlnet,
      transformer,
      np.moveaxis(mine["hidden_states"], 1, -1),
      np.moveaxis(mine["controlnet_cond"], 1, -1),
      (
        mine["timestep"],
        mine["encoder_hidden_states"],
        mine["encoder_attention_mask"] != 0,
      ),
      case["conditioning_scale"],
    )
    outputs[f"{run}sample"] = np.moveaxis(np.asarray(sample), -1, 1)
    for i, residual in enumerate(residuals):
      tokens = residual.reshape(residual.shape[0], -1, residual.shape[-1])
      outputs[f"{run}controlnet_block_samples.{i}"] = np.asarray(tokens)
  return {name: outputs[name] for name in wanted}


def _load(case_dir: pathlib.Path) -> controlnet_lib.SanaControlNet:
  """Loads what the case has; original files must give the same model."""
  model, config = components.load_controlnet(case_dir / "controlnet")
  for path in case_dir.glob("controlnet_original.*"):
    original, _ = components.load_controlnet(path, config=config)
    jax.tree.map(np.testing.assert_array_equal, model, original)
    model = original
  return model


def _both(controlnet, transformer, latents, control, condition, scale):
  residuals = controlnet_lib.control_residuals(
    controlnet,
    transformer,
    latents,
    control,
    *condition,
    conditioning_scale=scale,
  )
  after = controlnet_lib.first_block("diffusers")
  sample = transformer(
    latents, *condition, residuals=residuals, residuals_after=after
  )
  return residuals, sample
