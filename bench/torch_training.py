"""The side of PyTorch: a plain loop with AdamW, clipping and an average.

Writes the parameters of both sides, too. Imported in its own process only.
"""

import contextlib
import copy
import functools
import itertools
import pathlib

import diffusers
import numpy as np
import torch

from bench import training_loads
from bench.harness import sides
from sana_jax.weights import opening


def make_side(
  size: str, directory: str, *, device: str, threads: int, compiled: bool
) -> sides.LocalSide:
  """Writes the parameters that both sides begin with, and offers the cases."""
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  diffusers.utils.logging.set_verbosity_error()
  diffusers.utils.logging.disable_progress_bar()
  loads = training_loads.LOADS[size]
  for name, load in loads.items():
    path = pathlib.Path(directory) / name / "transformer"
    if not path.exists():
      _model(load, device).save_pretrained(path)
  cases = {
    name: functools.partial(
      _case,
      load,
      pathlib.Path(directory) / name / "transformer",
      device=device,
      compiled=compiled,
    )
    for name, load in loads.items()
  }
  return sides.LocalSide(cases, functools.partial(_memory, device))


def _model(load: training_loads.Load, device: str):
  with torch.device(device):
    return diffusers.SanaTransformer2DModel.from_config(
      opening.config_json(load.model())
    )


def _memory(device: str) -> dict[str, int]:
  if device == "cpu":
    return {}
  return {"peak_device_bytes": torch.cuda.max_memory_allocated()}


def _case(
  load: training_loads.Load, path, *, device: str, compiled: bool
) -> sides.Case:
  if device != "cpu":
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
  loop = _Loop(load, path, device=device, compiled=compiled)

  def run():
    results = loop.step()
    if device != "cpu":
      torch.cuda.synchronize()
    return results

  def outputs(first):
    told = [first, run()]
    return {
      name: np.array([float(step[name]) for step in told])
      for name in ("loss", "grad_norm")
    }

  return sides.Case(run, outputs)


class _Loop:
  """What a user would write."""

  def __init__(self, load, path, *, device: str, compiled: bool):
    model = diffusers.SanaTransformer2DModel.from_pretrained(path)
    self.model = model.to(device).train()
    if load.remat == "full":
      self.model.enable_gradient_checkpointing()
    self.average = copy.deepcopy(list(self.model.parameters()))
    self.optimiser = torch.optim.AdamW(
      self.model.parameters(),
      lr=training_loads.LEARNING_RATE,
      weight_decay=training_loads.WEIGHT_DECAY,
      foreach=True,
    )
    self.forward = torch.compile(self.model) if compiled else self.model
    self.device, self.dtype = device, load.dtype
    # Two batches, over and over: making them is no part of a step.
    some = itertools.islice(training_loads.batches(load), 2)
    self.batches = itertools.cycle([self._put(batch) for batch in some])
    self.count = 0

  def step(self):
    batch = next(self.batches)
    sigma = batch["sigma"][:, None, None, None]
    noisy = (1 - sigma) * batch["latents"] + sigma * batch["noise"]
    with self._autocast():
      velocity = self.forward(
        noisy,
        batch["text"],
        timestep=1000 * batch["sigma"],
        encoder_attention_mask=batch["text_mask"],
      ).sample
    target = batch["noise"] - batch["latents"]
    loss = torch.nn.functional.mse_loss(velocity.float(), target)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(
      self.model.parameters(), training_loads.CLIP_NORM
    )
    self.optimiser.step()
    self.optimiser.zero_grad(set_to_none=True)
    decay = min(training_loads.EMA_DECAY, (1 + self.count) / (10 + self.count))
    self.count += 1
    with torch.no_grad():
      parameters = list(self.model.parameters())
      torch._foreach_lerp_(self.average, parameters, 1 - decay)
    return {"loss": loss.detach(), "grad_norm": norm.detach()}

  def _autocast(self):
    if self.dtype == "float32":
      return contextlib.nullcontext()
    return torch.autocast(self.device, getattr(torch, self.dtype))

  def _put(self, batch):
    moved = {
      name: torch.tensor(array, device=self.device)
      for name, array in batch.items()
    }
    for name in ("latents", "noise"):
      moved[name] = moved[name].movedim(-1, 1).contiguous()
    return moved | {"text_mask": moved["text_mask"].long()}
