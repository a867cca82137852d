"""Trains what a config describes: train.py --config=configs/x.py --workdir=DIR.

Running the same command again continues from the last checkpoint. On SIGTERM a
checkpoint is saved first; SIGUSR1 profiles the next three steps. On a TPU pod,
under Slurm or Open MPI, the same command on all hosts makes one run of them;
elsewhere, --coordinator does.
"""

import os
import sys

import jax
from absl import app, flags, logging
from etils import epath

from sana_jax import (
  checkpoint,
  compilation_cache,
  config_flag,
  devices,
  host_memory,
  presets,
  sharding,
)
from sana_jax import config as config_lib
from sana_jax.training import (
  autoencoder,
  launch,
  loop,
  preemption,
  profiling,
  stages,
  text_to_image,
  wandb_sink,
)
from sana_jax.training import recipe as recipe_lib

_CONFIG = config_flag.define()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Directory for checkpoints, metrics, samples and the export."
)
_CACHE = compilation_cache.define_flag()
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed",
  None,
  "True: it is an error if no other process is found; False: do not look.",
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "HOST:PORT of process 0, where nothing else tells it."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "How many processes there are, with --coordinator."
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Number of this one, from 0, with --coordinator."
)
_JOIN_TIMEOUT = flags.DEFINE_integer(
  "join_timeout", 300, "Seconds to wait for the other processes.", 1
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  "heartbeat_timeout", 100, "Seconds until a silent process counts as dead.", 1
)
_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps", None, "FIRST:LAST step to profile, to WORKDIR/profile."
)
_WANDB_PROJECT = flags.DEFINE_string(
  "wandb_project", None, "Weights & Biases project that gets the metrics, too."
)
flags.mark_flags_as_required(["config", "workdir"])

_RECIPES = {
  config_lib.TextToImageConfig: text_to_image.make_recipe,
  config_lib.AutoencoderConfig: lambda config, _: autoencoder.make_recipe(
    config
  ),
}

_parse_flags = config_flag.parser("train.py")


def _make_recipe(config: config_lib.Config, workdir: str) -> recipe_lib.Recipe:
  if type(config) not in _RECIPES:
    kinds = [*_RECIPES, config_lib.StagesConfig]
    raise ValueError(
      f"get_config() of --config must return one of "
      f"{', '.join(cls.__name__ for cls in kinds)}, got "
      f"{type(config).__name__}."
    )
  config.freeze()
  # Before any work: a mesh that does not fit the devices is an error.
  presets.check_devices(config, jax.device_count())
  mesh = sharding.make_mesh(config.mesh)
  logging.info("%s", presets.describe(config, mesh.shape))
  return _RECIPES[type(config)](config, workdir)


def _join_others() -> None:
  if _DISTRIBUTED.value is False:
    return
  cluster = launch.find_cluster(
    os.environ,
    coordinator=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
  )
  if cluster is not None:
    launch.join(
      cluster,
      timeout=_JOIN_TIMEOUT.value,
      heartbeat_timeout=_HEARTBEAT_TIMEOUT.value,
    )
  elif _DISTRIBUTED.value:
    raise ValueError(
      "--distributed, but neither a TPU pod, Slurm nor Open MPI tells of "
      "another process; give --coordinator, --num_processes and --process_id."
    )


def _options() -> loop.Options:
  if _WANDB_PROJECT.value is not None:
    wandb_sink.check_installed()
  steps = _PROFILE_STEPS.value
  return loop.Options(
    argv=sys.argv,
    profile_steps=None if steps is None else profiling.parse_steps(steps),
    wandb_project=_WANDB_PROJECT.value,
  )


def _run() -> None:
  options = _options()
  _join_others()
  devices.check()
  config = _CONFIG.value
  logging.info(
    "%s on %d %s device(s)",
    type(config).__name__,
    jax.device_count(),
    jax.default_backend(),
  )

  def train(
    config: config_lib.Config,
    workdir: epath.PathLike,
    stop: preemption.StopRequest | None = None,
  ):
    recipe = _make_recipe(config, workdir)
    return loop.train(config, workdir, recipe, options, stop)

  if isinstance(config, config_lib.StagesConfig):
    stages.train(config, _WORKDIR.value, train)
  else:
    train(config, _WORKDIR.value)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  if jax.config.jax_platforms == "cpu":
    # Before JAX starts its threads, which is when it looks for devices.
    host_memory.keep_freed()
  compilation_cache.enable(_CACHE.value, os.environ)
  checkpoint.quiet_orbax()
  try:
    _run()
  except MemoryError as error:
    logging.error("%s", error)
    launch.leave(1)
  except (ValueError, OSError, FloatingPointError, ImportError) as error:
    logging.error("%s", " ".join(str(error).split()))
    logging.debug("raised here (--verbosity=1 shows it)", exc_info=True)
    launch.leave(1)


if __name__ == "__main__":
  profiling.ignore_signal()
  app.run(main, flags_parser=_parse_flags)
