"""A small text-to-image step on any mesh, and what its program communicates."""

import dataclasses
import functools
import re
from typing import NamedTuple

import jax
import numpy as np

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.data import loader
from sana_jax.models import sana
from sana_jax.training import inputs, placement, text_to_image
from sana_jax.training import program as program_lib
from tests import tiny

# Sizes that parameters do not have: a collective with one moves activations.
BATCH, ROWS, COLUMNS, TOKENS = 8, 8, 7, 5


def make_config(mesh, **changes) -> config_lib.TextToImageConfig:
  """Args are fields of the model, or else of the run."""
  values = {
    "num_attention_heads": 8,
    "attention_head_dim": 8,
    "num_cross_attention_heads": 4,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 64,
    "mlp_ratio": 2.5,
  }
  fields = {field.name for field in dataclasses.fields(config_lib.SanaConfig)}
  for name in fields & set(changes):
    values[name] = changes.pop(name)
  model = tiny.transformer_config(**values)
  config = config_lib.TextToImageConfig(
    batch_size=BATCH, dtype="float32", model=model, mesh=mesh, num_steps=20
  )
  config.optim.warmup_steps = 2
  config.optim.peak_lr = 2e-3
  for name, value in changes.items():
    setattr(config, name, value)
  return config


def read_batches(host: loader.Host, first_step: int):
  """The samples of a host; those of a step depend on the step alone."""
  step = first_step
  while True:
    rng = np.random.default_rng(step)
    whole = {
      "latents": rng.normal(size=(BATCH, ROWS, COLUMNS, 4)),
      "text": rng.normal(size=(BATCH, TOKENS, 12)),
      "text_mask": np.arange(TOKENS) < rng.integers(1, TOKENS, (BATCH, 1)),
    }
    share = BATCH // host.processes
    mine = slice(host.process * share, (host.process + 1) * share)
    yield {
      name: array[mine].astype(bool if name == "text_mask" else np.float32)
      for name, array in whole.items()
    }
    step += 1


class Run(NamedTuple):
  """A run that is ready to start."""

  program: program_lib.Program
  frozen: dict[str, jax.Array]
  mesh: jax.sharding.Mesh
  config: config_lib.TextToImageConfig

  def batches(self):
    return placement.global_batches(
      read_batches, self.config, self.mesh, first_step=0
    )

  def losses(self, steps: int) -> list[float]:
    batches, key = self.batches(), jax.random.key(1)
    state, losses = self.program.init(jax.random.key(0)), []
    for _ in range(steps):
      state, metrics = self.program.step(state, self.frozen, key, next(batches))
      losses.append(float(metrics["loss"]))
    return losses

  def hlo(self) -> str:
    return self._compiled().as_text()

  def _compiled(self):
    batch, key = next(self.batches()), jax.random.key(1)
    return self.program.step.lower(
      self.program.state, self.frozen, key, batch
    ).compile()


def make_run(mesh_axes, devices=None, **changes) -> Run:
  config = make_config(mesh_axes, **changes)
  mesh = sharding.make_mesh(mesh_axes, devices)
  null = {
    "null_text": np.ones((1, TOKENS, 12), np.float32),
    "null_text_mask": np.arange(TOKENS)[None] < 1,
  }
  param_axes = {"transformer": sana.PARAM_AXES}
  frozen = sharding.place(
    null, placement.frozen_shardings(null, param_axes, mesh)
  )
  program = program_lib.make_program(
    config,
    init=functools.partial(text_to_image.init_params, config),
    param_axes=param_axes,
    loss_fn=functools.partial(
      text_to_image.flow_loss,
      config=config,
      condition=inputs.cached_conditions,
    ),
    mesh=mesh,
  )
  return Run(program, frozen, mesh, config)


class Collective(NamedTuple):
  """One collective of a compiled program.

  Attributes:
    kind: such as "all-reduce".
    shapes: of its results, on one device.
    groups: the devices that take part, as XLA writes it.
  """

  kind: str
  shapes: tuple[tuple[int, ...], ...]
  groups: str


_COLLECTIVE = re.compile(
  r" = (?P<result>.*?) "
  r"(?P<kind>all-reduce|all-gather|all-to-all|reduce-scatter|"
  r"collective-permute|ragged-all-to-all)(?:-start)?\((?P<rest>.*)"
)
_SHAPE = re.compile(r"\b[a-z]+\d*\[([\d,]*)\]")
_GROUPS = re.compile(r"(?:replica_groups|source_target_pairs)=(\S+?)(?:, |$)")


def collectives(hlo: str) -> list[Collective]:
  """Lists the collectives in the text of a compiled program."""
  found = []
  for line in hlo.splitlines():
    match = _COLLECTIVE.search(line)
    if match is None:
      continue
    shapes = tuple(
      tuple(int(n) for n in dims.split(",") if n)
      for dims in _SHAPE.findall(match["result"])
    )
    groups = _GROUPS.search(match["rest"])
    found.append(Collective(match["kind"], shapes, groups[1] if groups else ""))
  return found
