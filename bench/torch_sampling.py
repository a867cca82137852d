"""The side of PyTorch: diffusers' models and pipelines, in eager mode or not.

Writes the checkpoint of both sides, too. Imported in its own process only.
"""

import functools
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

import sana_jax
from bench import workloads
from bench.harness import sides
from sana_jax import config as config_lib
from sana_jax.weights import opening

_SHARED = ("vae", "text_encoder", "tokenizer")


def make_side(
  size: str,
  directory: str,
  *,
  dtype: str,
  device: str,
  threads: int,
  compiled: bool,
) -> sides.LocalSide:
  """Writes what checkpoints there are not yet, and offers the cases.

  Args:
    device: of PyTorch: "cpu" or "cuda".
    compiled: True wraps the models in `torch.compile`.
  """
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  diffusers.utils.logging.set_verbosity_error()
  diffusers.utils.logging.disable_progress_bar()
  transformers.utils.logging.set_verbosity_error()
  transformers.utils.logging.disable_progress_bar()
  options = {"dtype": getattr(torch, dtype), "device": device}
  write_checkpoints(workloads.SIZES[size], pathlib.Path(directory), **options)
  bench = _Torch(pathlib.Path(directory), compiled=compiled, **options)
  cases = {
    name: functools.partial(bench.case, size, workload)
    for name, workload in workloads.SIZES[size].workloads.items()
  }
  return sides.LocalSide(cases, functools.partial(memory, device))


def memory(device: str) -> dict[str, int]:
  if device == "cpu":
    return {}
  return {"peak_device_bytes": torch.cuda.max_memory_allocated()}


def write_checkpoints(
  size: workloads.Size, directory: pathlib.Path, *, dtype, device: str
) -> None:
  """Writes pipelines of random weights in the layout of diffusers.

  Autoencoder and text encoder, alike in all of a size, are there once.
  """
  first = None
  for name, make in size.checkpoints.items():
    path = directory / name
    if not (path / "model_index.json").exists():
      path.mkdir(parents=True, exist_ok=True)
      checkpoint = make()
      _write_transformer(path, checkpoint.transformer, dtype, device)
      _scheduler(checkpoint).save_pretrained(path / "scheduler")
      if first is None:
        _write_shared(path, checkpoint, dtype, device)
      else:
        for part in _SHARED:
          (path / part).symlink_to((first / part).resolve())
      _write_index(path, checkpoint)
    first = first or path


def _write_transformer(
  path: pathlib.Path, config: config_lib.SanaConfig, dtype, device: str
) -> None:
  with torch.device(device):
    model = diffusers.SanaTransformer2DModel.from_config(
      opening.config_json(config)
    )
  model.to(dtype).save_pretrained(path / "transformer")


def _write_shared(path, checkpoint, dtype, device: str) -> None:
  with torch.device(device):
    vae = diffusers.AutoencoderDC.from_config(
      opening.config_json(checkpoint.autoencoder)
    )
    values = opening.config_json(checkpoint.text_encoder)
    text_encoder = transformers.Gemma2Model(
      transformers.Gemma2Config.from_dict(values)
    )
  vae.to(dtype).save_pretrained(path / "vae")
  text_encoder.to(dtype).save_pretrained(path / "text_encoder")
  bundled = pathlib.Path(sana_jax.bundled_checkpoint()) / "tokenizer"
  shutil.copytree(bundled, path / "tokenizer")


def _scheduler(checkpoint: workloads.Checkpoint):
  if checkpoint.is_sprint:
    return diffusers.SCMScheduler()
  return diffusers.DPMSolverMultistepScheduler(
    prediction_type="flow_prediction",
    use_flow_sigmas=True,
    flow_shift=3.0,
  )


def _pipeline_class(checkpoint: workloads.Checkpoint):
  if checkpoint.is_sprint:
    return diffusers.SanaSprintPipeline
  return diffusers.SanaPipeline


def _write_index(path: pathlib.Path, checkpoint) -> None:
  """Writes model_index.json, as the last file."""
  _pipeline_class(checkpoint)(
    tokenizer=_tokenizer(path),
    text_encoder=None,
    vae=None,
    transformer=None,
    scheduler=_scheduler(checkpoint),
  ).save_config(path)


def _tokenizer(path: pathlib.Path):
  return transformers.PreTrainedTokenizerFast.from_pretrained(
    path / "tokenizer"
  )


class _Torch:
  """Builds cases."""

  def __init__(self, directory, *, dtype, device: str, compiled: bool):
    self._directory = directory
    self._dtype, self._device, self._compiled = dtype, device, compiled

  def case(self, size: str, workload: workloads.Workload) -> sides.Case:
    if self._device != "cpu":
      torch.cuda.empty_cache()
      torch.cuda.reset_peak_memory_stats()
    make = workloads.SIZES[size].checkpoints[workload.checkpoint]
    checkpoint = make()
    builders = {
      "text": self._text,
      "transformer": self._transformer,
      "sampler": self._sampler,
      "decode": self._decode,
      "encode": self._encode,
      "pipeline": self._pipeline,
    }
    path = self._directory / workload.checkpoint
    given = workloads.inputs(checkpoint, workload)
    return builders[workload.kind](path, checkpoint, workload, given)

  def _text(self, path, checkpoint, workload, given) -> sides.Case:
    model = self._wrap(
      self._load(transformers.Gemma2Model, path, "text_encoder")
    )
    ids, mask = self._put(given.input_ids), self._put(given.ids_mask)

    def run():
      return model(ids, attention_mask=mask)[0]

    return self._case(run, lambda y: {"states": y * mask[..., None]})

  def _transformer(self, path, checkpoint, workload, given) -> sides.Case:
    model = self._wrap(
      self._load(diffusers.SanaTransformer2DModel, path, "transformer")
    )
    latents, text, timestep, mask = (
      self._put(x)
      for x in (
        _channels_first(given.latents),
        *(given.text, given.timestep, given.mask.astype(np.int64)),
      )
    )

    def run():
      return model(
        latents, text, timestep=timestep, encoder_attention_mask=mask
      ).sample

    return self._case(run, lambda y: {"velocity": y.movedim(1, -1)})

  def _decode(self, path, checkpoint, workload, given) -> sides.Case:
    vae = self._load(diffusers.AutoencoderDC, path, "vae")
    latents = self._put(_channels_first(given.latents))
    return self._faster_layout(
      vae, lambda model: lambda: model.decode(latents).sample, "images"
    )

  def _encode(self, path, checkpoint, workload, given) -> sides.Case:
    vae = self._load(diffusers.AutoencoderDC, path, "vae")
    images = self._put(_channels_first(given.images))
    return self._faster_layout(
      vae, lambda model: lambda: model.encode(images).latent, "latents"
    )

  def _faster_layout(self, vae, make_run: Callable, name: str) -> sides.Case:
    """Takes the faster of the two layouts PyTorch has for pictures."""
    if self._compiled:
      vae.encoder, vae.decoder = map(self._wrap, (vae.encoder, vae.decoder))
    best = None
    for layout in (torch.contiguous_format, torch.channels_last):
      run = self._case(make_run(vae.to(memory_format=layout)), None).run
      run()
      start = time.perf_counter()
      run()
      seconds = time.perf_counter() - start
      if best is None or seconds < best[0]:
        best = seconds, layout
    vae.to(memory_format=best[1])
    return self._case(make_run(vae), lambda y: {name: y.movedim(1, -1)})

  def _sampler(self, path, checkpoint, workload, given) -> sides.Case:
    pipe = self._load_pipeline(path, checkpoint, vae=False)
    mask = self._put(given.mask.astype(np.int64))
    embeds = {
      "prompt_embeds": self._put(given.text),
      "prompt_attention_mask": mask,
      "negative_prompt_embeds": self._put(given.null_text),
      "negative_prompt_attention_mask": mask,
    }
    options = self._options(workload, given) | embeds

    def run():
      return pipe(
        prompt=None, negative_prompt=None, output_type="latent", **options
      ).images

    return self._case(run, lambda y: {"latents": y.movedim(1, -1)})

  def _pipeline(self, path, checkpoint, workload, given) -> sides.Case:
    pipe = self._load_pipeline(path, checkpoint, vae=True)
    options = self._options(workload, given)
    if checkpoint.is_sprint:
      options |= {"generator": torch.Generator(self._device).manual_seed(0)}
    prompts = workloads.prompts(workload.batch)

    def run():
      return pipe(
        prompt=next(prompts),
        output_type="np",
        complex_human_instruction=list(workloads.INSTRUCTION),
        **options,
      ).images

    # The noise between the steps of Sprint is each side's own.
    return self._case(
      run, lambda y: {} if checkpoint.is_sprint else {"images": y}
    )

  def _options(self, workload, given) -> dict[str, Any]:
    return {
      # In float32: a scheduler keeps the type it is given.
      "latents": torch.tensor(
        _channels_first(given.latents), device=self._device
      ),
      "num_inference_steps": workload.steps,
      "guidance_scale": workloads.GUIDANCE,
      "height": workload.pixels,
      "width": workload.pixels,
      "use_resolution_binning": False,
      "clean_caption": False,
      "max_sequence_length": workloads.TEXT_LENGTH,
    }

  def _load(self, cls, path: pathlib.Path, part: str):
    model = cls.from_pretrained(path / part, torch_dtype=self._dtype)
    return model.to(self._device).eval()

  def _load_pipeline(self, path, checkpoint, *, vae: bool):
    transformer = self._load(
      diffusers.SanaTransformer2DModel, path, "transformer"
    )
    pipe = _pipeline_class(checkpoint)(
      tokenizer=_tokenizer(path),
      text_encoder=self._load(transformers.Gemma2Model, path, "text_encoder")
      if vae
      else None,
      vae=self._load(diffusers.AutoencoderDC, path, "vae"),
      transformer=transformer,
      scheduler=_scheduler(checkpoint),
    )
    if self._compiled:
      pipe.transformer.forward = torch.compile(pipe.transformer.forward)
      pipe.vae.decoder.forward = torch.compile(pipe.vae.decoder.forward)
    if max(checkpoint.transformer.sample_size, 0) >= 128:
      pipe.vae.enable_tiling()
    pipe.set_progress_bar_config(disable=True)
    return pipe

  def _wrap(self, model):
    return torch.compile(model) if self._compiled else model

  def _put(self, array: np.ndarray):
    tensor = torch.tensor(array, device=self._device)
    return tensor.to(self._dtype) if tensor.is_floating_point() else tensor

  def _case(self, function: Callable, outputs: Callable | None) -> sides.Case:
    def run():
      with torch.inference_mode():
        result = function()
      if self._device != "cpu":
        torch.cuda.synchronize()
      return result

    def to_host(result):
      return {k: _numpy(v) for k, v in outputs(result).items()}

    return sides.Case(run, to_host)


def _channels_first(array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(np.moveaxis(array, -1, 1))


def _numpy(value) -> np.ndarray:
  if isinstance(value, np.ndarray):
    return value
  return value.to(torch.float32).cpu().numpy()
