"""Our side: the models and the pipeline as a user runs them."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sana_jax
from bench import workloads
from bench.harness import sides
from sana_jax.models import dc_ae
from sana_jax.pipeline import denoising
from sana_jax.weights import components


def make_side(size: str, directory: str, *, dtype: str) -> sides.LocalSide:
  """Offers the cases of a size, of checkpoints that are there.

  Args:
    dtype: of parameters and computation.
  """
  path = pathlib.Path(directory)
  cases = {
    name: functools.partial(_case, size, path, workload, jnp.dtype(dtype))
    for name, workload in workloads.SIZES[size].workloads.items()
  }
  return sides.LocalSide(cases, memory)


def memory() -> dict[str, int]:
  """Returns the peak of the device so far; a CPU does not say."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if "peak_bytes_in_use" not in stats:
    return {}
  return {"peak_device_bytes": stats["peak_bytes_in_use"]}


def _case(size: str, directory, workload, dtype) -> sides.Case:
  checkpoint = workloads.SIZES[size].checkpoints[workload.checkpoint]()
  builders = {
    "text": _text,
    "transformer": _transformer,
    "sampler": _sampler,
    "decode": _decode,
    "encode": _encode,
    "pipeline": _pipeline,
  }
  path = directory / workload.checkpoint
  given = workloads.inputs(checkpoint, workload)
  return builders[workload.kind](path, checkpoint, workload, given, dtype)


def _text(path, checkpoint, workload, given, dtype) -> sides.Case:
  model, _ = components.load_text_encoder(path / "text_encoder", dtype=dtype)
  ids, mask = jnp.asarray(given.input_ids), jnp.asarray(given.ids_mask)
  run = _jitted(lambda model, *args: model(*args), model, ids, mask)
  return _make(run, lambda y: {"states": y * mask[..., None]})


def _transformer(path, checkpoint, workload, given, dtype) -> sides.Case:
  model, _ = components.load_transformer(
    path / "transformer", dtype=dtype, scan=_scans()
  )
  args = (given.latents, given.timestep, given.text.astype(dtype), given.mask)
  run = _jitted(
    lambda model, *args: model(*args), model, *map(jnp.asarray, args)
  )
  return _make(run, lambda y: {"velocity": y})


def _decode(path, checkpoint, workload, given, dtype) -> sides.Case:
  model, _ = components.load_autoencoder(path / "vae", dtype=dtype)
  run = _jitted(dc_ae.DCAE.decode, model, jnp.asarray(given.latents, dtype))
  return _make(run, lambda y: {"images": y})


def _encode(path, checkpoint, workload, given, dtype) -> sides.Case:
  model, _ = components.load_autoencoder(path / "vae", dtype=dtype)
  run = _jitted(dc_ae.DCAE.encode, model, jnp.asarray(given.images, dtype))
  return _make(run, lambda y: {"latents": y})


def _sampler(path, checkpoint, workload, given, dtype) -> sides.Case:
  pipe = _load_pipeline(path, dtype)
  mask = jnp.asarray(given.mask)
  conditions = [
    denoising.Condition(jnp.asarray(states), mask)
    for states in (given.text, given.null_text)
  ]
  settings = pipe.generation_config.replace(_settings(workload))
  schedule = pipe.make_schedule(settings)

  def run():
    return jax.block_until_ready(
      pipe.denoise(given.latents, schedule, *conditions, settings)
    )

  return _make(run, lambda y: {"latents": y})


def _pipeline(path, checkpoint, workload, given, dtype) -> sides.Case:
  pipe = _load_pipeline(path, dtype)
  # A prompt is encoded once: each call has others.
  prompts = workloads.prompts(workload.batch)
  options = _settings(workload) | {
    "height": workload.pixels,
    "width": workload.pixels,
    "use_resolution_binning": False,
    "max_sequence_length": workloads.TEXT_LENGTH,
    "complex_human_instruction": workloads.INSTRUCTION,
  }

  def run():
    return pipe(next(prompts), latents=given.latents, **options).images

  return _make(run, lambda y: {} if checkpoint.is_sprint else {"images": y})


def _settings(workload: workloads.Workload) -> dict[str, Any]:
  return {
    "num_inference_steps": workload.steps,
    "guidance_scale": workloads.GUIDANCE,
  }


def _load_pipeline(path: pathlib.Path, dtype) -> sana_jax.SanaPipeline:
  return sana_jax.SanaPipeline.from_pretrained(
    path, dtype=dtype, devices=jax.devices()[:1], fp16_clamp=False
  )


def _scans() -> bool:
  """Blocks are unrolled on a CPU, where that is faster."""
  return jax.default_backend() != "cpu"


def _jitted(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
  jitted = jax.jit(function)
  return lambda: jax.block_until_ready(jitted(*args))


def _make(run: Callable[[], Any], outputs: Callable) -> sides.Case:
  def to_host(result):
    return {k: np.asarray(v, np.float32) for k, v in outputs(result).items()}

  return sides.Case(run, to_host)
