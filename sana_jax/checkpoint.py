"""Saving and restoring a training state with Orbax.

On disk a state is nested dicts of arrays keyed by parameter names, never a
Python class: `state/params/transformer/blocks/...`. A checkpoint that was not
completely written is never seen, so a run may be killed at any moment.
"""

import contextlib
import logging as std_logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers

from sana_jax import config as config_lib
from sana_jax import tree


class _Save(NamedTuple):
  """A checkpoint that is being written.

  Attributes:
    waited: seconds that the caller spent on it.
  """

  step: int
  started: float
  waited: float


class _Manager(ocp.CheckpointManager):
  """Leaves JAX's preemption service to the loop.

  Orbax asks it about every step that it saves, before and after. The service
  takes the number that it was told last for where the process is; those of the
  loop count its calls, and are no steps.
  """

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


class Checkpointer:
  """Keeps the checkpoints of one run under `workdir/checkpoints`.

  Args:
    config: which of them stay.
  """

  def __init__(
    self, workdir: epath.PathLike, config: config_lib.CheckpointConfig
  ):
    self._directory = epath.Path(workdir).absolute() / "checkpoints"
    self._config = config
    self._saving: _Save | None = None
    best = config.keep_best > 0
    self._manager = _Manager(
      self._directory,
      item_handlers={"state": ocp.StandardCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(
        create=True,
        preservation_policy=_retention(config),
        # Makes the manager store metrics beside the state.
        best_fn=_rank(config) if best else None,
        best_mode=config.best_mode,
      ),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def steps(self) -> list[int]:
    """Returns the steps of all complete checkpoints, in order."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    state: Any,
    metrics: Mapping[str, float] | None = None,
    notes: Mapping[str, Any] | None = None,
  ) -> None:
    """Writes in the background; a second save waits for the first.

    Args:
      notes: what JSON can hold, for `notes`.
      metrics: of the steps before; needed where the best checkpoints are kept.

    Raises:
      OSError: this checkpoint cannot be written, or the one before could not.
      ValueError: `metrics` lacks the one that says which is best.
    """
    if self._manager.latest_step() == step:
      return
    ranked = self._ranked(metrics or {})
    nested = tree.to_nested_dict(state)
    started = time.monotonic()
    self.wait()
    with self._failing_of(step):
      self._manager.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(nested)),
        metrics=ranked,
        custom_metadata=dict(notes or {}),
      )
    self._saving = _Save(step, started, time.monotonic() - started)

  def poll(self) -> None:
    """Says when the last save is done; to be called often.

    Raises:
      OSError: it failed.
    """
    if self._saving is not None and not self._manager.is_saving_in_progress():
      # Only waiting raises what went wrong: `check_for_errors` stays silent.
      self.wait()

  def wait(self) -> None:
    """Waits until the last save is done.

    Raises:
      OSError: it failed.
    """
    if self._saving is None:
      return
    with self._failing_of(self._saving.step):
      self._manager.wait_until_finished()
    step, started, waited = self._saving
    logging.info(
      "saved checkpoint %d in %.1f s, of which training waited %.1f s",
      *(step, time.monotonic() - started, waited),
    )
    self._saving = None

  def notes(self, step: int) -> dict[str, Any]:
    """Returns what was noted beside a state; of an older one, nothing."""
    return self._manager.metadata(step).custom_metadata or {}

  def check(self, step: int, abstract: Any) -> None:
    """Compares what is saved with `abstract`, without reading it.

    Raises:
      ValueError: names or shapes on disk differ; all differences are listed.
    """
    saved = self._manager.item_metadata(step)["state"]
    check_matches(saved, abstract, f"checkpoint {step}")

  def restore(self, step: int, abstract: Any) -> Any:
    """Reads a state into the structure, dtypes and shardings of `abstract`.

    Raises:
      ValueError: see `check`.
    """
    self.check(step, abstract)
    nested = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(tree.to_nested_dict(abstract))
      ),
    )["state"]
    return tree.from_nested_dict(nested, like=abstract)

  def close(self) -> None:
    self._manager.close()

  def _ranked(self, metrics: Mapping[str, float]) -> dict[str, float] | None:
    name = self._config.best_metric
    if self._config.keep_best == 0:
      return None
    if name not in metrics:
      raise ValueError(
        f"checkpoint.best_metric {name!r} is not measured; there are "
        f"{', '.join(sorted(metrics))}."
      )
    return {name: float(metrics[name])}

  @contextlib.contextmanager
  def _failing_of(self, step: int) -> Iterator[None]:
    """Makes one kind of error of all that writing may raise."""
    try:
      yield
    # Orbax passes on whatever a thread of its raised.
    except Exception as error:
      self._saving = None
      raise OSError(
        f"checkpoint {step} could not be written to {self._directory} "
        f"({type(error).__name__}: {error}); the earlier ones are intact. Make "
        f"room or mend the permissions, and run the same command again."
      ) from error


def _retention(
  config: config_lib.CheckpointConfig,
) -> checkpoint_managers.PreservationPolicy:
  policies = [checkpoint_managers.LatestN(config.keep)]
  if config.keep_every:
    policies.append(checkpoint_managers.EveryNSteps(config.keep_every))
  if config.keep_best:
    policies.append(
      checkpoint_managers.BestN(
        get_metric_fn=_rank(config),
        reverse=config.best_mode == "min",
        n=config.keep_best,
        keep_checkpoints_without_metrics=False,
      )
    )
  return checkpoint_managers.AnyPreservationPolicy(policies)


def _rank(config: config_lib.CheckpointConfig):
  return lambda metrics: metrics[config.best_metric]


def quiet_orbax() -> None:
  """Keeps Orbax's many lines about every file out of the log of a command."""
  logging.get_absl_handler().addFilter(
    lambda record: (
      "orbax" not in record.pathname or record.levelno >= std_logging.WARNING
    )
  )


def saved_steps(workdir: epath.PathLike) -> list[int]:
  """Lists the steps of the complete checkpoints of a run, in order."""
  directory = epath.Path(workdir).absolute() / "checkpoints"
  if not directory.exists():
    return []
  return sorted(ocp.utils.checkpoint_steps(directory))


def find_step(workdir: epath.PathLike, step: int | None = None) -> int:
  """Returns a step that is saved: this one, or the newest for None.

  Raises:
    FileNotFoundError: nothing is saved there, or not that step.
  """
  directory = epath.Path(workdir).absolute() / "checkpoints"
  steps = saved_steps(workdir)
  if not steps:
    raise FileNotFoundError(
      f"{directory} holds no checkpoint yet; wait for the run's first."
    )
  step = steps[-1] if step is None else step
  if step not in steps:
    raise FileNotFoundError(
      f"{directory} holds no checkpoint of step {step}, only of {steps}."
    )
  return step


def restore_average(
  workdir: epath.PathLike, abstract: Any, *, step: int | None = None
) -> Any:
  """Reads the average of the parameters, or these where none was kept.

  Args and errors are those of `restore_part`.
  """
  return restore_part(workdir, "ema", abstract, step=step, otherwise="params")


def restore_part(
  workdir: epath.PathLike,
  part: str,
  abstract: Any,
  *,
  step: int | None = None,
  otherwise: str | None = None,
) -> Any:
  """Reads one entry of a saved state, such as "ema", and nothing else.

  Args:
    abstract: as in `Checkpointer.restore`, of that entry.
    otherwise: the entry to read where `part` was not saved.
    step: None: the newest.

  Raises:
    FileNotFoundError: nothing is saved there, or not that step.
    ValueError: names or shapes on disk differ; all differences are listed.
  """
  step = find_step(workdir, step)
  directory = epath.Path(workdir).absolute() / "checkpoints"
  path = directory / str(step) / "state"
  handler = ocp.PyTreeCheckpointHandler()
  with ocp.Checkpointer(handler) as reader:
    # Of the handler: the checkpointer warns of an item's lack of its own file.
    saved = handler.metadata(path).tree
    if otherwise is not None and part not in saved:
      part = otherwise
    wanted = {part: tree.to_nested_dict(abstract)}
    check_matches(saved.get(part, {}), abstract, f"checkpoint {step}")
    nested = reader.restore(
      path,
      args=ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
      ),
    )[part]
  return tree.from_nested_dict(nested, like=abstract)


def check_matches(saved: Any, abstract: Any, source: str) -> None:
  """Compares names and shapes, and reports every difference at once."""
  on_disk = _shapes(saved)
  wanted = _shapes(tree.to_nested_dict(abstract))
  problems = [f"missing {n} {wanted[n]}" for n in wanted if n not in on_disk]
  problems += [
    f"unexpected {n} {on_disk[n]}" for n in on_disk if n not in wanted
  ]
  problems += [
    f"{n}: {on_disk[n]} on disk, {wanted[n]} in the config"
    for n in wanted
    if n in on_disk and on_disk[n] != wanted[n]
  ]
  if problems:
    raise ValueError(
      f"{source} does not fit this config ({len(problems)} differences): "
      f"{'; '.join(problems[:8])}{' ...' if len(problems) > 8 else ''}. "
      f"Use the config that made it, or another --workdir."
    )


def _shapes(values: Any) -> dict[str, tuple[int, ...]]:
  names, leaves = tree.leaf_names(values), jax.tree.leaves(values)
  return {n: tuple(v.shape) for n, v in zip(names, leaves, strict=True)}
