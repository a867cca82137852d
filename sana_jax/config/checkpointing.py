"""What of a run is kept on disk."""

import dataclasses

from sana_jax.config.base import Config, require


@dataclasses.dataclass(kw_only=True)
class CheckpointConfig(Config):
  """When the state is saved, and which saved states stay.

  A checkpoint stays that is among the newest, or the best, or permanent.

  Args:
    every: steps between checkpoints; a killed run loses at most so many.
    keep: how many of the newest stay.
    keep_every: checkpoints of multiples of this step stay for good; 0: none.
    keep_best: how many of the best stay; 0: none.
    best_metric: name of a metric of `metrics.jsonl`; what counts is its mean
      over the last `every` steps. Only checkpoints of multiples of `every` are
      compared: others, of a run that was stopped, lose to all of them.
    best_mode: "min" or "max": which of its values are good.
  """

  every: int = 500
  keep: int = 2
  keep_every: int = 0
  keep_best: int = 0
  best_metric: str = "loss"
  best_mode: str = "min"

  def validate(self) -> None:
    problems = [
      f"checkpoint.{name} must be at least {least}, got {getattr(self, name)}"
      for name, least in (
        *(("every", 1), ("keep", 1), ("keep_every", 0), ("keep_best", 0)),
      )
      if getattr(self, name) < least
    ]
    if self.keep_every > 0 and self.keep_every % max(self.every, 1):
      problems.append(
        f"checkpoint.keep_every ({self.keep_every}) must be a multiple of "
        f"checkpoint.every ({self.every}): no other steps are saved"
      )
    if self.best_mode not in ("min", "max"):
      problems.append(
        f"checkpoint.best_mode must be 'min' or 'max', got {self.best_mode!r}"
      )
    require(not problems, f"{'; '.join(problems)}.")
