"""Saving and restoring a training state with Orbax.

On disk a state is nested dicts of arrays keyed by parameter names, never a
Python class: `state/params/transformer/blocks/...`. A checkpoint that was not
completely written is never seen, so a run may be killed at any moment.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from sana_jax import tree


class Checkpointer:
  """Keeps the newest checkpoints of one run under `workdir/checkpoints`."""

  def __init__(self, workdir: epath.PathLike, *, keep: int):
    self._manager = ocp.CheckpointManager(
      epath.Path(workdir).absolute() / "checkpoints",
      item_handlers={"state": ocp.StandardCheckpointHandler()},
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: Any) -> None:
    """Writes in the background; a second save waits for the first."""
    if self._manager.latest_step() == step:
      return
    nested = tree.to_nested_dict(state)
    self._manager.save(
      step, args=ocp.args.Composite(state=ocp.args.StandardSave(nested))
    )

  def restore(self, step: int, abstract: Any) -> Any:
    """Reads a state into the structure, dtypes and shardings of `abstract`.

    Raises:
      ValueError: names or shapes on disk differ; all differences are listed.
    """
    saved = self._manager.item_metadata(step)["state"]
    check_matches(saved, abstract, f"checkpoint {step}")
    nested = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(tree.to_nested_dict(abstract))
      ),
    )["state"]
    return tree.from_nested_dict(nested, like=abstract)

  def reached_preemption(self, step: int) -> bool:
    """True on all hosts at the same step once one of them got SIGTERM."""
    return self._manager.reached_preemption(step)

  def wait(self) -> None:
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def restore_part(
  workdir: epath.PathLike, part: str, abstract: Any, *, step: int | None = None
) -> Any:
  """Reads one entry of a saved state, such as "ema", and nothing else.

  Args:
    abstract: as in `Checkpointer.restore`, of that entry.
    step: None: the newest.

  Raises:
    FileNotFoundError: nothing is saved there, or not that step.
    ValueError: names or shapes on disk differ; all differences are listed.
  """
  directory = epath.Path(workdir).absolute() / "checkpoints"
  steps = sorted(ocp.utils.checkpoint_steps(directory))
  if not steps:
    raise FileNotFoundError(
      f"{directory} holds no checkpoint yet; wait for the run's first."
    )
  step = steps[-1] if step is None else step
  if step not in steps:
    raise FileNotFoundError(
      f"{directory} holds no checkpoint of step {step}, only of {steps}."
    )
  path = directory / str(step) / "state"
  wanted = {part: tree.to_nested_dict(abstract)}
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    saved = reader.metadata(path).item_metadata.tree
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
