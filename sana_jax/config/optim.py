"""How parameters are updated."""

import dataclasses
import math

from sana_jax.config.base import Config, require


@dataclasses.dataclass(kw_only=True)
class OptimConfig(Config):
  """AdamW with linear warm-up, a schedule, and global-norm clipping.

  Args:
    schedule: after warm-up: "constant", or "cosine" down to `final_lr_ratio`
      of the peak at the last step.
  """

  peak_lr: float = 1e-4
  warmup_steps: int = 2000
  schedule: str = "constant"
  final_lr_ratio: float = 0.0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  weight_decay: float = 0.01
  clip_norm: float = 0.1

  def validate(self) -> None:
    require(
      self.schedule in ("constant", "cosine"),
      f"optim.schedule must be 'constant' or 'cosine', got {self.schedule!r}.",
    )
    for name in ("peak_lr", "clip_norm", "eps"):
      value = getattr(self, name)
      require(
        value > 0 and math.isfinite(value),
        f"optim.{name} must be a positive number, got {value}.",
      )
    for name in ("warmup_steps", "weight_decay"):
      value = getattr(self, name)
      require(value >= 0, f"optim.{name} must not be negative, got {value}.")
    for name in ("b1", "b2"):
      value = getattr(self, name)
      require(0 <= value < 1, f"optim.{name} must be in [0, 1), got {value}.")
    require(
      0 <= self.final_lr_ratio <= 1,
      f"optim.final_lr_ratio must be in [0, 1], got {self.final_lr_ratio}.",
    )
