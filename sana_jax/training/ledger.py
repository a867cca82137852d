"""What a run's data are: checked at its start, counted by epoch.

The work directory gets

- `data.json`: what tells whether a later start has the same data;
- `data_report.json`: what of every source is read, used and skipped (why, and
  what each is called), and what the latest epochs consisted of.

All counts are functions of the step.
"""

import json
from typing import Any

import jax
from absl import logging
from etils import epath

from sana_jax.data import opening

IDENTITY = "data.json"
REPORT = "data_report.json"
# Epochs that the report has; of small data there may be very many.
_KEPT = 20
_SHORT = 12


class Ledger:
  """Keeps the books of a run.

  Files that are others than at the last start, or were written since, are
  warned of if the same records are used at the same shapes.

  Args:
    allow_changed: True warns of data that have changed, False refuses them.
  """

  def __init__(self, opened: opening.Opened, *, allow_changed: bool):
    self._opened = opened
    self._allow_changed = allow_changed
    self._workdir: epath.Path | None = None
    self._epoch: int | None = None

  def begin(self, workdir: epath.Path, *, has_learned: bool) -> None:
    """Compares the data with those that the run began with.

    Args:
      has_learned: whether there is a checkpoint; if not, any data will do.

    Raises:
      ValueError: they are others; says in what.
    """
    self._workdir = workdir
    # As a reader of the file sees them.
    ours = json.loads(
      json.dumps(
        [
          {"source": report.source, **identity}
          for report, identity in zip(
            self._opened.reports, self._opened.identities, strict=True
          )
        ]
      )
    )
    path = workdir / IDENTITY
    known = has_learned and path.exists()
    theirs = json.loads(path.read_text()) if known else ours
    changes = _changes(theirs, ours)
    for their, our in zip(theirs, ours, strict=False):
      stamps = [side.get(opening.STAMP) for side in (their, our)]
      if not changes and all(stamps) and stamps[0] != stamps[1]:
        logging.warning(
          "%s: files have changed since the run was started last; the same "
          "records are used, and pictures or captions may be others",
          our["source"],
        )
    if changes and not self._allow_changed:
      raise ValueError(
        f"The data of the run in {workdir} have changed: {'; '.join(changes)}. "
        "Take another --workdir, or bring back the data as they were, or set "
        "data.allow_changed=True to go on with these."
      )
    if changes:
      logging.warning("the data have changed: %s", "; ".join(changes))
    _write(path, ours)

  def note(self, step: int) -> None:
    """Logs and writes what is new when so many steps are done."""
    epoch = self._opened.plans.epoch(step)
    if epoch == self._epoch:
      return
    for line in self.lines(self._epoch, step):
      logging.info("%s", line)
    self._epoch = epoch
    if self._workdir is not None:
      _write(self._workdir / REPORT, self.report(step))

  def lines(self, before: int | None, step: int) -> list[str]:
    """Says what epochs ended, and which one it is now.

    Args:
      before: the epoch when it was said last; None: never.
    """
    plans, reports = self._opened.plans, self._opened.reports
    epoch = plans.epoch(step)
    found = []
    if before is not None and before < epoch:
      counts = plans.counts(epoch - 1)
      several = f", the last of {epoch - before}," if epoch - before > 1 else ""
      found = [f"epoch {epoch - 1}{several} ended with step {counts.end_step}:"]
      for report, drawn in zip(reports, counts.drawn, strict=True):
        found.append(f"  {report}; {drawn} samples")
      found.append(f"  {counts.carried} samples left for the next epoch")
    counts = plans.counts(epoch)
    steps = f"steps {counts.first_step + 1} to {counts.end_step}"
    return [*found, f"epoch {epoch} has {steps}"]

  def report(self, step: int) -> dict[str, Any]:
    """Returns everything, as JSON has it, when so many steps are done."""
    plans, opened = self._opened.plans, self._opened
    epoch = plans.epoch(step)
    return {
      "batch_size": plans.batch_size,
      "step": step,
      "epoch": epoch,
      "sources": [report.to_json() for report in opened.reports],
      "shapes": [
        {"height": height, "width": width, "batches_per_epoch": float(count)}
        for (height, width), count in zip(
          opened.shapes, plans.batches_per_epoch(), strict=True
        )
      ],
      "epochs_ended": [
        self._of_epoch(number) for number in range(epoch)[-_KEPT:]
      ],
    }

  def _of_epoch(self, number: int) -> dict[str, Any]:
    plans, reports = self._opened.plans, self._opened.reports
    counts = plans.counts(number)
    return {
      "epoch": number,
      "first_step": counts.first_step + 1,
      "last_step": counts.end_step,
      "trained": (counts.end_step - counts.first_step) * plans.batch_size,
      "carried_over": counts.carried,
      "sources": [
        {
          "source": report.source,
          "read": report.read,
          "used": report.used,
          "skipped": report.skipped,
          "samples": drawn,
        }
        for report, drawn in zip(reports, counts.drawn, strict=True)
      ],
    }


def _changes(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]):
  if len(theirs) != len(ours):
    return [f"{len(ours)} sources, {len(theirs)} before"]
  return [
    f"{our['source']}: {name} is {_short(our.get(name))}, was "
    f"{_short(their.get(name))}"
    for their, our in zip(theirs, ours, strict=True)
    for name in our | their
    if name not in ("source", opening.STAMP)
    and our.get(name) != their.get(name)
  ]


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else json.dumps(value)
  return text if len(text) <= 5 * _SHORT else f"{text[:_SHORT]}..."


def _write(path: epath.Path, values: Any) -> None:
  if jax.process_index() == 0:
    partial = path.parent / f"{path.name}.partial"
    partial.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)
