"""LoRA reference cases, computed with the public API.

Outputs are `out.<adapter>.sample[_scale<s>]`, where an adapter is a directory
of the case, `out.base.sample` without one, and `out.pipe.latents_scale<s>` of a
short sampler call. Each is computed with the adapter fused and with it
attached, which must agree.
"""

import functools
import pathlib
import re

import jax
import numpy as np

from sana_jax.diffusion import scheduler_config
from sana_jax.models import sana
from sana_jax.pipeline import denoising
from sana_jax.weights import components, lora

Arrays = dict[str, np.ndarray]

_OUTPUT = re.compile(
  r"out\.(?P<run>.+)\.(?P<kind>sample|latents)(?:_scale(?P<scale>.+))?"
)


def lora_case(case: dict, inputs: Arrays, case_dir: pathlib.Path) -> Arrays:
  """Returns every `out.` tensor that `case["tensors"]` names.

  Args:
    case: the contents of case.json.
    inputs: the `in.` tensors, with their prefix.
    case_dir: where the transformer and the adapters are.
  """
  model, config = components.load_transformer(case_dir / "transformer")
  adapters = {
    path.parent.name: lora.load(path.parent)
    for path in sorted(case_dir.glob("*/*.safetensors"))
    if path.parent.name != "transformer"
  }
  compute = {
    "sample": functools.partial(_sample, inputs=inputs),
    "latents": functools.partial(
      _latents, case=case, inputs=inputs, timestep_scale=config.timestep_scale
    ),
  }
  outputs = {}
  for name in case["tensors"]:
    if match := _OUTPUT.fullmatch(name):
      # The pipeline of the case has the first of its adapters.
      run = next(iter(adapters)) if match["run"] == "pipe" else match["run"]
      loras = (
        [] if run == "base" else [(adapters[run], float(match["scale"] or 1))]
      )
      fused, attached = (
        np.moveaxis(np.asarray(compute[match["kind"]](variant)), -1, 1)
        for variant in (lora.fuse(model, loras), lora.attach(model, loras))
      )
      # Rounding: the sums are made in another order.
      scale = np.abs(fused).max()
      np.testing.assert_allclose(fused, attached, atol=2e-5 * scale)
      outputs[name] = attached
  return outputs


@jax.jit
def _network(model: sana.SanaTransformer, *args) -> jax.Array:
  return model(*args)


def _sample(model: sana.SanaTransformer, inputs: Arrays) -> jax.Array:
  return _network(
    model,
    np.moveaxis(inputs["in.hidden_states"], 1, -1),
    inputs["in.timestep"],
    inputs["in.encoder_hidden_states"],
    inputs["in.encoder_attention_mask"] != 0,
  )


def _latents(
  model: sana.SanaTransformer,
  case: dict,
  inputs: Arrays,
  timestep_scale: float,
) -> jax.Array:
  steps = int(re.search(r"(\d+) step", case["inputs"])[1])
  guidance_scale = float(re.search(r"guidance ([\d.]+)", case["inputs"])[1])
  # The case names the class in its prose only.
  solver = scheduler_config.from_config(
    {"_class_name": "DPMSolverMultistepScheduler"} | case["scheduler"]
  )
  mask = inputs["in.pipe.mask"] != 0
  condition, null = (
    denoising.Condition(inputs[f"in.pipe.{name}"], mask)
    for name in ("prompt_embeds", "negative_prompt_embeds")
  )
  denoise = jax.jit(
    functools.partial(denoising.denoise, timestep_scale=timestep_scale)
  )
  return denoise(
    transformer=model,
    schedule=solver.schedule(steps),
    scales=denoising.Scales(guidance_scale, 0.0, 0.0, 0.0),
    latents=np.moveaxis(inputs["in.pipe.latents"], 1, -1),
    condition=condition,
    null_condition=null,
  )
