"""Where the arrays of a run are: state, fixed components, batches."""

from collections.abc import Iterator
from typing import Any

import jax

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.data import loader
from sana_jax.training import optim
from sana_jax.training import step as step_lib


def state_shardings(abstract, param_axes, mesh):
  """Shards moments and average like their parameters, the rest replicated.

  Optimiser states must be placed explicitly: they start as zeros, which depend
  on no sharded input, so jit alone would put them all on one device.
  """
  params = {
    name: sharding.param_shardings(module, param_axes[name], mesh)
    for name, module in abstract.params.items()
  }
  replicated = sharding.replicated(mesh)
  opt_state = optim.state_shardings(
    abstract.opt_state, abstract.params, params, mesh
  )
  return step_lib.TrainState(replicated, params, params, opt_state, replicated)


def frozen_shardings(frozen, param_axes, mesh):
  """Shards frozen components like trained ones; what has no rows is whole."""
  replicated = sharding.replicated(mesh)
  return {
    name: sharding.param_shardings(arrays, param_axes[name], mesh)
    if name in param_axes
    else jax.tree.map(lambda _: replicated, arrays)
    for name, arrays in frozen.items()
  }


def this_host(config: config_lib.TrainConfig) -> loader.Host:
  """Returns which rows of a batch this process reads, and how."""
  return loader.Host(
    jax.process_index(),
    jax.process_count(),
    config.data.num_threads,
    config.data.num_workers,
  )


def global_batches(
  batches: loader.HostBatches,
  config: config_lib.TrainConfig,
  mesh: jax.sharding.Mesh,
  *,
  first_step: int,
) -> Iterator[Any]:
  """Yields the batches of step `first_step`, `first_step` + 1, ...

  Every process reads its rows of a batch, in the order of the processes; the
  global batch of a step is the same whatever their number.

  Raises:
    ValueError: the batch does not divide over the devices.
  """
  if config.batch_size % mesh.size:
    raise ValueError(
      f"batch_size ({config.batch_size}) must be a multiple of the number of "
      f"devices ({mesh.size})."
    )
  host = this_host(config)
  place = sharding.batch_sharding(mesh)
  for batch in batches(host, first_step):
    yield jax.tree.map(
      lambda x: jax.make_array_from_process_local_data(place, x), batch
    )
