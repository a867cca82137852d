"""What is looked at before a run begins, lest it end after hours."""

import math

import jax
from absl import logging
from etils import epath

from sana_jax import config as config_lib
from sana_jax import sharding


def check_batch(
  config: config_lib.TrainConfig, mesh: jax.sharding.Mesh
) -> None:
  """Checks that a batch spreads over the devices.

  Raises:
    ValueError: it does not.
  """
  axes = sharding.RULES["batch"]
  samples = math.prod(mesh.shape[axis] for axis in axes)
  parts = config.optim.accumulation
  if config.batch_size % (parts * samples) == 0:
    return
  product = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axes)
  preset = config.hardware.preset
  remedy = (
    f" The preset {preset} chose them for another batch: set "
    f"--config.optim.accumulation and --config.mesh too, or batch_size in the "
    f"config file, before the preset."
    if preset is not None
    else ""
  )
  raise ValueError(
    f"batch_size ({config.batch_size}) must be a multiple of {product}"
    f"{f' x optim.accumulation={parts}' if parts > 1 else ''}.{remedy}"
  )


def check_length(
  config: config_lib.TrainConfig, workdir: epath.Path, latest: int | None
) -> None:
  """Checks that the run goes as far as it has gone.

  Args:
    latest: step of the newest checkpoint.

  Raises:
    ValueError: it has gone further than it should.
  """
  if latest is not None and config.num_steps < latest:
    raise ValueError(
      f"num_steps ({config.num_steps}) is less than what {workdir} has done: "
      f"its newest checkpoint is of step {latest}. Raise num_steps, or use "
      "another --workdir."
    )


def warn_of_length(
  config: config_lib.TrainConfig,
  latest: int | None,
  profile_steps: tuple[int, int] | None,
) -> None:
  """Warns, in the first process, of what will happen at no step.

  Args:
    latest: step of the newest checkpoint.
  """
  if jax.process_index() != 0:
    return
  first, last = (latest or 0) + 1, config.num_steps
  if config.optim.warmup_steps >= last:
    logging.warning(
      "optim.warmup_steps (%d) is not less than num_steps (%d): the learning "
      "rate never reaches its peak; set --config.optim.warmup_steps lower, "
      "unless this run is only a trial",
      *(config.optim.warmup_steps, last),
    )
  if profile_steps is None or first > last:
    return
  begin, end = profile_steps
  if begin < first or end > last:
    some = "not all of them" if begin <= last and end >= first else "none"
    logging.warning(
      "--profile_steps=%d:%d, but the steps of this run are %d to %d: %s will "
      "be profiled; name others, or send SIGUSR1 for the next three",
      *(begin, end, first, last, some),
    )
