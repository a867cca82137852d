"""How parameters are updated."""

import dataclasses
import math
import re
from collections.abc import Iterator

from sana_jax.config.base import Config, require

OPTIMIZERS = ("adamw", "adafactor", "lion", "muon", "came", "came_8bit")
SCHEDULES = ("constant", "cosine", "wsd")

# Fields that some optimisers only, or some schedules only, read.
_READ_BY_OPTIMIZER = {
  "b1": ("adamw", "lion", "muon", "came", "came_8bit"),
  "b2": ("adamw", "muon", "came", "came_8bit"),
  "eps": ("adamw", "muon"),
  "came_b3": ("came", "came_8bit"),
  "lion_b2": ("lion",),
  "muon_beta": ("muon",),
  "moment_dtype": ("adamw", "lion", "muon"),
}
_READ_BY_SCHEDULE = {
  "final_lr_ratio": ("cosine", "wsd"),
  "decay_steps": ("wsd",),
}


@dataclasses.dataclass(kw_only=True)
class OptimConfig(Config):
  """An optimiser, its learning rate, and what is done to gradients before.

  A value that the chosen optimiser or schedule does not read is an error.
  Patterns are regular expressions, searched in names such as
  "transformer/blocks/self_attention/qkv/kernel"; one that matches no parameter
  is an error.

  Args:
    name: "adamw", "adafactor", "lion", "muon" (matrices of the blocks; AdamW on
      the rest), "came", or "came_8bit" (CAME with a first moment of 8 bits).
    peak_lr: the learning rate after warm-up, at a batch of 256 when
      `batch_scaling` is not "none".
    batch_scaling: "none"; "sqrt": times sqrt(batch_size / 256), what SANA's
      published rates are meant with; "linear": times batch_size / 256.
    schedule: after warm-up: "constant"; "cosine" down to `final_lr_ratio` of
      the peak at the last step; or "wsd": constant, then linearly down to
      `final_lr_ratio` of the peak over the last `decay_steps`.
    b1: decay of the first moment.
    b2: decay of the second moment; Lion's is `lion_b2`.
    came_b3: decay of CAME's instability.
    muon_beta: decay of Muon's momentum; b1, b2 and eps are of its AdamW.
    moment_dtype: of the first moment, "float32" or "bfloat16".
    weight_decay: decoupled, times the learning rate.
    weight_decay_exclude: patterns of parameters that do not decay; as
      published, all decay, norms and biases too.
    lr_multipliers: pattern -> factor of the learning rate; the first pattern
      that matches counts.
    frozen: patterns of parameters that are not trained, and have no state.
    clip_norm: of the gradient of all trained parameters together.
    accumulation: parts that a batch is taken in, one after the other, to save
      memory; the gradient is their mean.
  """

  name: str = "adamw"
  peak_lr: float = 1e-4
  batch_scaling: str = "none"
  warmup_steps: int = 2000
  schedule: str = "constant"
  final_lr_ratio: float = 0.0
  decay_steps: int = 0
  b1: float = 0.9
  b2: float = 0.999
  eps: float = 1e-8
  came_b3: float = 0.9999
  lion_b2: float = 0.99
  muon_beta: float = 0.95
  moment_dtype: str = "float32"
  weight_decay: float = 0.01
  weight_decay_exclude: tuple[str, ...] = ()
  lr_multipliers: dict[str, float] = dataclasses.field(default_factory=dict)
  frozen: tuple[str, ...] = ()
  clip_norm: float = 0.1
  accumulation: int = 1

  def validate(self) -> None:
    problems = [
      *self._unknown_choices(),
      *self._without_effect(),
      *self._out_of_range(),
      *self._bad_patterns(),
    ]
    require(not problems, f"{'; '.join(problems)}.")

  def _unknown_choices(self) -> Iterator[str]:
    for field, choices in (
      ("name", OPTIMIZERS),
      ("schedule", SCHEDULES),
      ("batch_scaling", ("none", "sqrt", "linear")),
      ("moment_dtype", ("float32", "bfloat16")),
    ):
      value = getattr(self, field)
      if value not in choices:
        yield f"optim.{field} must be one of {choices}, got {value!r}"

  def _without_effect(self) -> Iterator[str]:
    defaults = OptimConfig()
    for by, readers in (
      ("name", _READ_BY_OPTIMIZER),
      ("schedule", _READ_BY_SCHEDULE),
    ):
      for field, choices in readers.items():
        value, chosen = getattr(self, field), getattr(self, by)
        if chosen not in choices and value != getattr(defaults, field):
          yield (
            f"optim.{field} ({value}) has no effect with optim.{by}="
            f"{chosen!r}, only with {choices}: leave it out"
          )
    if self.weight_decay_exclude and not self.weight_decay:
      yield "optim.weight_decay_exclude has no effect without a weight_decay"

  def _out_of_range(self) -> Iterator[str]:
    for field in ("peak_lr", "clip_norm", "eps"):
      value = getattr(self, field)
      if not 0 < value < math.inf:
        yield f"optim.{field} must be a positive number, got {value}"
    for field in ("warmup_steps", "weight_decay", "decay_steps"):
      value = getattr(self, field)
      if not 0 <= value < math.inf:
        yield f"optim.{field} must not be negative, got {value}"
    for field in ("b1", "b2", "came_b3", "lion_b2", "muon_beta"):
      value = getattr(self, field)
      if not 0 <= value < 1:
        yield f"optim.{field} must be in [0, 1), got {value}"
    if not 0 <= self.final_lr_ratio <= 1:
      yield f"optim.final_lr_ratio must be in [0, 1], got {self.final_lr_ratio}"
    if self.schedule == "wsd" and self.decay_steps < 1:
      yield (
        "optim.decay_steps must be at least 1 with optim.schedule='wsd', got "
        f"{self.decay_steps}"
      )
    if self.accumulation < 1:
      yield f"optim.accumulation must be at least 1, got {self.accumulation}"

  def _bad_patterns(self) -> Iterator[str]:
    for field in ("weight_decay_exclude", "lr_multipliers", "frozen"):
      for pattern in getattr(self, field):
        try:
          re.compile(pattern)
        except re.error as error:
          yield (
            f"optim.{field} has {pattern!r}, no regular expression: {error}"
          )
    for pattern, factor in self.lr_multipliers.items():
      if not 0 < factor < math.inf:
        yield (
          f"optim.lr_multipliers[{pattern!r}] must be a positive number, got "
          f"{factor}; to train nothing there, name it in optim.frozen"
        )
