"""Predicts which arrangements of a run fit, and what they would cost.

Nothing is compiled: the bytes of the state are exact, those of activations a
count of values per token, scaled by what the one compiled step took.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType

from sana_jax import config as config_lib
from sana_jax import hardware, sharding
from sana_jax.plan import compilation, roofline, theory
from sana_jax.training import budget
from sana_jax.training import program as program_lib

# Values of the width that the backward pass has of a block for each token, in
# bytes: all, those of products of weights, or the block's input.
_KEPT = {"none": 70.0, "dots": 28.0, "full": 4.0, "offload": 0.0}
# What the link to the host costs is not predicted.
_CANDIDATES = ("none", "dots", "full")


class Candidate(NamedTuple):
  """One arrangement and what is predicted of it.

  Attributes:
    total: bytes of a device.
    sent: bytes that a device sends in a step, at least.
  """

  chips: int
  mesh: Mapping[str, int]
  remat: str
  batch_size: int
  total: int
  sent: float
  times: roofline.Times
  prediction: roofline.Prediction


class Study(NamedTuple):
  """What candidates have in common.

  Attributes:
    activations: scale of the predicted bytes of activations.
    efficiency: see `roofline.compute_seconds`.
  """

  config: config_lib.TextToImageConfig
  program: program_lib.Program
  chip: hardware.Chip
  latent_size: tuple[int, int]
  efficiency: float
  num_images: float
  num_slices: int = 1
  activations: float = 1.0


def calibrated(
  study: Study, mesh: jax.sharding.Mesh, temporaries: int
) -> Study:
  """Scales activations so that the compiled step is predicted exactly.

  What is left of a step's temporaries without its gradients and the gathered
  parameters are its activations; never less than a tenth of the count.
  """
  rest = temporaries - _weights(study.program.state.params, study.config)
  counted = _activations(study, mesh.shape, study.config)
  return study._replace(activations=max(rest / counted, 0.1))


def candidates(study: Study, chips: Sequence[int]) -> Iterator[Candidate]:
  """Yields what is predicted of every mesh of so many chips."""
  most = max(chips) // study.num_slices
  states = {fsdp: _sharded(study, fsdp) for fsdp in _shards(most, 1)}
  for count in chips:
    if study.config.batch_size % (count * study.config.optim.accumulation):
      continue
    for fsdp in _shards(count, study.num_slices):
      if states[fsdp] is not None:
        mesh = {"data": count // fsdp, "fsdp": fsdp, "tensor": 1, "sequence": 1}
        yield from _on_mesh(study, states[fsdp], mesh)


def cheapest(found: Sequence[Candidate], hbm_bytes: int) -> Candidate | None:
  """Returns what fits and takes the fewest chip-hours, then fewest chips.

  A per cent of chip-hours is no difference; then less memory is better. What is
  only predicted must leave a tenth of the memory.
  """
  fitting = [one for one in found if one.total <= 0.9 * hbm_bytes]
  if not fitting:
    return None
  least = min(one.prediction.chip_hours for one in fitting)
  return min(
    (one for one in fitting if one.prediction.chip_hours <= 1.01 * least),
    key=lambda one: (one.chips, one.total),
  )


def _shards(chips: int, num_slices: int) -> list[int]:
  """Returns the powers of two that are shards, with copies for all slices."""
  return [
    2**n
    for n in range(chips.bit_length())
    if chips % 2**n == 0 and chips // 2**n % num_slices == 0
  ]


def _sharded(study: Study, fsdp: int) -> Any:
  """Returns the abstract state over so many shards; None: there are fewer."""
  mesh = AbstractMesh(
    (1, fsdp, 1, 1), sharding.AXES, axis_types=(AxisType.Auto,) * 4
  )
  try:
    return compilation.make_program(study.config, mesh).state
  except ValueError:  # The width does not divide: most would stay whole.
    return None


def _on_mesh(
  study: Study, state: Any, mesh: Mapping[str, int]
) -> Iterator[Candidate]:
  config = study.config
  sent = theory.least_bytes(
    state.params, mesh, config.dtype, config.optim.accumulation
  )
  held = sum(budget.state_budget(state).values())
  for remat in _CANDIDATES:
    config = _with_remat(study.config, remat)
    working = _weights(state.params, config) + study.activations * _activations(
      study, mesh, config
    )
    times = step_times(study, config, state, sent, mesh)
    chips = math.prod(mesh.values())
    yield Candidate(
      chips,
      mesh,
      remat,
      config.batch_size,
      held + int(working),
      sum(sent.values()),
      times,
      roofline.predict(
        times.step,
        batch_size=config.batch_size,
        chips=chips,
        num_images=study.num_images,
      ),
    )


def step_times(
  study: Study,
  config: config_lib.TextToImageConfig,
  state: Any,
  sent: theory.Bytes,
  mesh: Mapping[str, int],
) -> roofline.Times:
  """Returns the roofline of a step that sends `sent`."""
  chips = math.prod(mesh.values())
  parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  return roofline.Times(
    roofline.compute_seconds(
      config,
      study.chip,
      chips=chips,
      latent_size=study.latent_size,
      efficiency=study.efficiency,
    ),
    roofline.memory_seconds(
      config,
      study.chip,
      state_bytes=sum(budget.state_budget(state).values()),
      tokens=_tokens(study, config, chips),
      parameters=parameters / mesh["tensor"],
    ),
    roofline.network_seconds(sent, study.chip, mesh, study.num_slices),
  )


def _tokens(study: Study, config, chips: int) -> float:
  """Counts the tokens that a chip works on."""
  whole = config.batch_size * roofline.tokens_of(config, study.latent_size)
  return whole / chips


def _activations(study: Study, mesh: Mapping[str, int], config) -> float:
  """Counts the bytes that blocks keep, and those of the one at work."""
  model = config.model
  chips = math.prod(mesh.values())
  parts = config.optim.accumulation
  tokens = _tokens(study, config, chips) * mesh["tensor"] / parts
  kept = model.num_layers * _KEPT[config.remat] + _KEPT["none"]
  return tokens * model.width * kept


def _weights(params: Any, config) -> int:
  """Counts the bytes of gradients, and of two blocks' gathered parameters."""
  leaves = jax.tree.leaves(params)
  gathered = 2 * 2 * sum(leaf.size for leaf in leaves) / config.model.num_layers
  return int(budget.per_device_bytes(params) + gathered)


def _with_remat(config: config_lib.TextToImageConfig, remat: str):
  changed = config_lib.from_dict(type(config), config.to_dict())
  changed.remat = remat
  return changed
