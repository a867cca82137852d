"""What a run does about steps that go wrong."""

import dataclasses

from sana_jax.config.base import Config, require


@dataclasses.dataclass(kw_only=True)
class AnomalyConfig(Config):
  """How many bad steps are borne, and what is worth a line.

  A step is bad whose loss, gradient or update is not finite: it changes
  nothing. A spike is written down with its batch, and that is all.

  Args:
    rollback_after: bad steps in a row after which the parameters return to the
      last checkpoint before them; the data go on.
    max_rollbacks: of a run; one more, and it stops with a report.
    spike_factor: a loss is a spike beyond so many times the median of the last
      losses, earlier spikes included; 0: none is.
    spike_window: how many losses that median is of.
  """

  rollback_after: int = 10
  max_rollbacks: int = 3
  spike_factor: float = 10.0
  spike_window: int = 100

  def validate(self) -> None:
    problems = [
      f"anomalies.{name} must be at least {least}, got {getattr(self, name)}"
      for name, least in (
        *(("rollback_after", 1), ("max_rollbacks", 0), ("spike_window", 10)),
      )
      if getattr(self, name) < least
    ]
    if self.spike_factor != 0 and not self.spike_factor > 1:
      problems.append(
        "anomalies.spike_factor must be 0 or greater than 1, got "
        f"{self.spike_factor}"
      )
    require(not problems, f"{'; '.join(problems)}.")
