"""Transformer reference cases, computed with the public API.

`transformer_case` turns a case's inputs and model files into its outputs, under
the names and in the layouts of the reference: channels first, and gradients as
the checkpoint stores the parameters.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.diffusion import trigflow
from sana_jax.models import sana
from sana_jax.tools import activations
from sana_jax.weights import files, mapping, torch_zip
from sana_jax.weights import sana as sana_weights

Arrays = dict[str, np.ndarray]


def transformer_case(
  case: dict, inputs: Arrays, case_dir: pathlib.Path
) -> Arrays:
  """Returns every `out.` tensor that `case["tensors"]` names.

  Args:
    case: the contents of case.json.
    inputs: the `in.` tensors, with their prefix.
    case_dir: where config.json and the weights are.
  """
  case_dir = pathlib.Path(case_dir)
  config = config_lib.from_dict(
    config_lib.SanaConfig, files.read_json(case_dir / "config.json")
  )
  wanted = [name for name in case["tensors"] if name.startswith("out.")]
  outputs = {}
  for name in wanted:
    if not name.endswith("sample"):
      continue
    prefix = name.removeprefix("out.").removesuffix("sample")
    model = _load(case_dir, config, prefix.rstrip("."))
    kinds = {
      other.removeprefix(f"out.{prefix}").split(".")[0] for other in wanted
    }
    results = _run(model, config, _arguments(inputs, prefix), kinds)
    for key, value in results.items():
      outputs[f"out.{prefix}{key}"] = np.asarray(value)
  return {name: outputs[name] for name in wanted}


def _load(case_dir, config, run) -> sana.SanaTransformer:
  """Loads what the case has; original files must give the same model."""
  abstract = jax.eval_shape(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0))
  )
  variant = (case_dir / f"diffusion_pytorch_model.{run}.safetensors").exists()
  model = mapping.load(
    abstract,
    sana_weights.diffusers_rules(config),
    files.open_component(case_dir, variant=run if variant else None),
  )
  readers = {
    "original.safetensors": files.open_safetensors,
    "original.pth": torch_zip.open_pth,
  }
  for name, read in readers.items():
    if (case_dir / name).exists():
      original = mapping.load(
        abstract,
        sana_weights.original_rules(config),
        read(case_dir / name),
        ignore=sana_weights.ORIGINAL_IGNORED,
      )
      jax.tree.map(np.testing.assert_array_equal, model, original)
      model = original
  return model


def _arguments(inputs: Arrays, prefix: str) -> dict[str, jax.Array]:
  """The inputs of a run, or those that all runs share; channels last."""
  mine = {
    name.removeprefix(f"in.{prefix}"): value
    for name, value in inputs.items()
    if name.startswith(f"in.{prefix}")
  } or {name.removeprefix("in."): value for name, value in inputs.items()}
  arguments = {
    name: jnp.asarray(_channels_last(value) if value.ndim == 4 else value)
    for name, value in mine.items()
  }
  mask = arguments.pop("encoder_attention_mask", None)
  arguments["text_mask"] = None if mask is None else mask != 0
  return arguments


def _run(model, config, arguments, kinds) -> dict[str, jax.Array]:
  latents = arguments["hidden_states"]
  timestep = arguments["timestep"]
  text = arguments["encoder_hidden_states"]
  text_mask = arguments["text_mask"]
  guidance = arguments.get("guidance")

  def network(model, latents, timestep, text):
    return model(latents, timestep, text, text_mask, guidance=guidance)

  results = {"sample": jax.jit(network)(model, latents, timestep, text)}
  if "inter" in kinds:
    parts = jax.jit(activations.compute)(
      model, latents, timestep, text, text_mask, guidance=guidance
    )
    results |= {f"inter.{name}": value for name, value in parts.items()}
  if "loss" in kinds:
    results |= _gradients(
      network, model, config, latents, timestep, text, arguments["target"]
    )
  if "jvp_x" in kinds:
    results |= _derivatives(
      lambda x, t: network(model, x, t, text), latents, timestep, arguments
    )
  return {
    name: value.transpose(0, 3, 1, 2)
    if value.ndim == 4 and "grad." not in name
    else value
    for name, value in results.items()
  }


def _gradients(network, model, config, latents, timestep, text, target):
  def loss_fn(model, latents, text):
    sample = network(model, latents, timestep, text)
    return jnp.mean(jnp.square(sample - target))

  loss, (by_model, by_latents, by_text) = jax.jit(
    jax.value_and_grad(loss_fn, argnums=(0, 1, 2))
  )(model, latents, text)
  parameters = mapping.save(by_model, sana_weights.diffusers_rules(config))
  return {
    "loss": loss,
    "grad_in.hidden_states": by_latents,
    "grad_in.encoder_hidden_states": by_text,
    **{f"grad.{name}": value for name, value in parameters.items()},
  }


def _derivatives(velocity, latents, timestep, arguments):
  d_latents = arguments["tangent.hidden_states"]
  d_timestep = arguments["tangent.timestep"]
  angle = arguments["trigflow.t"]

  def trig(latents, angle):
    return trigflow.predict(lambda x, _, t: velocity(x, t), latents, angle)

  @jax.jit
  def along(latents, timestep, d_latents, d_timestep):
    return jax.jvp(velocity, (latents, timestep), (d_latents, d_timestep))[1]

  value, derivative = jax.jit(
    lambda: jax.jvp(trig, (latents, angle), (d_latents, d_timestep))
  )()
  still_x, still_t = jnp.zeros_like(d_latents), jnp.zeros_like(d_timestep)
  return {
    "jvp_x": along(latents, timestep, d_latents, still_t),
    "jvp_t": along(latents, timestep, still_x, d_timestep),
    "jvp_xt": along(latents, timestep, d_latents, d_timestep),
    "trigflow.value": value,
    "trigflow.jvp": derivative,
  }


def _channels_last(x: np.ndarray) -> np.ndarray:
  return x.transpose(0, 2, 3, 1)
