"""Steps that go wrong: counted, named, and answered by going back.

A step whose loss, gradient or update is not finite changes nothing but its
count (see `step.py`); after several in a row, the run goes back. A spike is a
finite loss far above the recent ones: it is written down, and never a reason to
go back. What happened is kept in `anomalies.jsonl`, and the recent losses in
every checkpoint, so that a resumed run goes on as the uninterrupted one would.
"""

import collections
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

from etils import epath

from sana_jax import config as config_lib

REPORT = "report.json"
# Losses before a median means anything.
_ENOUGH = 20


class Watch:
  """Follows a run from step to step; alike in all processes.

  Args:
    first_step: where the run goes on; what was noted later is forgotten.
    losses: `losses` as it was at that step.
    writes: whether this process keeps the file.

  Attributes:
    skipped: steps so far that changed nothing.
    rollbacks: so far.
    first_bad: the first of the skipped steps in a row; None: the last was not.
  """

  def __init__(
    self,
    config: config_lib.AnomalyConfig,
    workdir: epath.Path,
    *,
    first_step: int,
    writes: bool,
    losses: Sequence[float] = (),
  ):
    self._config = config
    self._path = workdir / "anomalies.jsonl"
    self._writes = writes
    self._losses = collections.deque(losses, config.spike_window)
    self.skipped, self.rollbacks, self._streak = 0, 0, 0
    self.first_bad: int | None = None
    self.rows = [row for row in _read(self._path) if row["step"] <= first_step]
    if writes and self._path.exists():
      _write(self._path, self.rows)
    for row in self.rows:
      self._count(row)
    if self.rows and self.rows[-1]["step"] < first_step:
      self._end_streak()

  def judge(self, step: int, loss: float, *, skipped: bool) -> str | None:
    """Returns what is wrong with a step: "skipped", "spike" or None."""
    limit = self._spike_limit()
    if math.isfinite(loss):
      # Spikes, too: a level that lasts becomes the median.
      self._losses.append(loss)
    if skipped:
      return "skipped"
    self._end_streak()
    return "spike" if limit is not None and loss > limit else None

  @property
  def losses(self) -> list[float]:
    """The finite ones of the last steps, which tell what is a spike."""
    return list(self._losses)

  def note(self, step: int, kind: str, **details: Any) -> None:
    """Writes down what is known of a step, and counts it if it was skipped."""
    self._add({"step": step, "kind": kind, **details})

  def note_rollback(self, step: int, to: int) -> None:
    """Writes down that the parameters of step `to` go on at `step`."""
    self._add({"step": step, "kind": "rollback", "to": to})

  def wants_rollback(self) -> bool:
    return self._streak >= self._config.rollback_after

  def is_exhausted(self) -> bool:
    """Whether the run has gone back as often as it may."""
    return self.rollbacks >= self._config.max_rollbacks

  def _spike_limit(self) -> float | None:
    enough = len(self._losses) >= min(_ENOUGH, self._config.spike_window)
    if self._config.spike_factor == 0 or not enough:
      return None
    return self._config.spike_factor * statistics.median(self._losses)

  def _add(self, row: dict[str, Any]) -> None:
    self.rows.append(row)
    self._count(row)
    if self._writes:
      with self._path.open("a") as file:
        file.write(json.dumps(row) + "\n")

  def _count(self, row: dict[str, Any]) -> None:
    self.rollbacks += row["kind"] == "rollback"
    if row["kind"] != "skipped":
      self._end_streak()
      return
    self.skipped += 1
    # A gap: good steps are not written down.
    if self.first_bad is None or row["step"] != self.first_bad + self._streak:
      self.first_bad, self._streak = row["step"], 0
    self._streak += 1

  def _end_streak(self) -> None:
    self.first_bad, self._streak = None, 0


def rollback_target(
  steps: Sequence[int], *, first_bad: int, every: int
) -> int | None:
  """Returns the checkpoint to go back to; None: to the beginning.

  It is the newest before the bad steps, of those that a run has that was never
  stopped, so that a resumed run goes back to the same.

  Args:
    steps: that are saved, in order.
    every: steps between regular checkpoints.
  """
  before = [step for step in steps if step < first_bad]
  regular = [step for step in before if step % every == 0]
  # The last resort are those of skipped steps, which changed nothing.
  best = regular[-1:] or before[-1:] or list(steps[:1])
  return best[0] if best else None


def write_report(
  path: epath.Path, step: int, watch: Watch, config: config_lib.TrainConfig
) -> None:
  """Writes what led to the end of a run."""
  report = {
    "stopped_at_step": step,
    "skipped_steps": watch.skipped,
    "rollbacks": watch.rollbacks,
    "limits": config.anomalies.to_dict(),
    "optim": config.optim.to_dict(),
    "dtype": config.dtype,
    "anomalies": watch.rows,
  }
  path.write_text(json.dumps(report, indent=2))


def _read(path: epath.Path) -> list[dict[str, Any]]:
  if not path.exists():
    return []
  # A killed process may have left half a row at the end.
  rows = path.read_text().splitlines(keepends=True)
  return [json.loads(row) for row in rows if row.endswith("\n")]


def _write(path: epath.Path, rows: list[dict[str, Any]]) -> None:
  # Renamed into place: other processes read it at the same time.
  partial = path.with_name(path.name + ".partial")
  partial.write_text("".join(json.dumps(row) + "\n" for row in rows))
  partial.replace(path)
