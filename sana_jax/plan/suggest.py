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
from sana_jax.plan import compile as compile_lib
from sana_jax.plan import roofline, theory
from sana_jax.training import budget, placement
from sana_jax.training import program as program_lib

# Values of the width that the backward pass has of a block for each token, in
# bytes: all, those of products of weights, or the block's input.
_KEPT = {"none": 70.0, "dots": 28.0, "full": 4.0}


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
  for count in chips:
    for mesh in _meshes(count, study.num_slices):
      if study.config.batch_size % count == 0:
        yield from _on_mesh(study, count, mesh)


def cheapest(found: Sequence[Candidate], hbm_bytes: int) -> Candidate | None:
  """Returns what fits and takes the fewest chip-hours, then fewest chips.

  A per cent of chip-hours is no difference; then less memory is better.
  """
  fitting = [one for one in found if one.total <= hbm_bytes]
  if not fitting:
    return None
  least = min(one.prediction.chip_hours for one in fitting)
  return min(
    (one for one in fitting if one.prediction.chip_hours <= 1.01 * least),
    key=lambda one: (one.chips, one.total),
  )


def _meshes(chips: int, num_slices: int) -> Iterator[AbstractMesh]:
  """Yields the meshes of copies and shards whose copies divide the slices."""
  for fsdp in (2**n for n in range(int(math.log2(chips)) + 1)):
    data = chips // fsdp
    if chips % fsdp == 0 and data % num_slices == 0:
      yield AbstractMesh(
        (data, fsdp, 1, 1),
        sharding.AXES,
        axis_types=(AxisType.Auto,) * 4,
      )


def _on_mesh(
  study: Study, chips: int, mesh: AbstractMesh
) -> Iterator[Candidate]:
  state = _resharded(study.program, mesh)
  sent = theory.least_bytes(state.params, mesh.shape, study.config.dtype)
  if not _cuts(sent, mesh):
    return
  held = sum(budget.state_budget(state).values())
  for remat in _KEPT:
    config = _with_remat(study.config, remat)
    working = _weights(state.params, config) + study.activations * _activations(
      study, mesh.shape, config
    )
    times = step_times(study, config, state, sent, mesh.shape)
    yield Candidate(
      chips,
      dict(mesh.shape),
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
  tokens = _tokens(study, config, chips) * mesh["tensor"]
  kept = model.num_layers * _KEPT[config.remat] + _KEPT["none"]
  return tokens * model.width * kept


def _weights(params: Any, config) -> int:
  """Counts the bytes of gradients, and of two blocks' gathered parameters."""
  leaves = jax.tree.leaves(params)
  gathered = 2 * 2 * sum(leaf.size for leaf in leaves) / config.model.num_layers
  return int(budget.per_device_bytes(params) + gathered)


def _resharded(program: program_lib.Program, mesh: AbstractMesh):
  """Returns the abstract state, sharded over another mesh."""
  bare = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), program.state
  )
  places = placement.state_shardings(
    bare, program.tx, compile_lib.PARAM_AXES, mesh
  )
  return jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    bare,
    places,
  )


def _cuts(sent: theory.Bytes, mesh: AbstractMesh) -> bool:
  """Whether the shards of a mesh are ones: most parameters are gathered."""
  gathered = sum(n for (_, kind), n in sent.items() if kind == "all-gather")
  return mesh.shape["fsdp"] == 1 or gathered > 0.5 * sum(sent.values())


def _with_remat(config: config_lib.TextToImageConfig, remat: str):
  changed = config_lib.from_dict(type(config), config.to_dict())
  changed.remat = remat
  return changed
