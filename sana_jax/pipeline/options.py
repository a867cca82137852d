"""Settings of a generation: a checkpoint's own, and what a call changes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from sana_jax import config, text

# Where None has a meaning of its own; elsewhere it is "not specified".
_NONE_MEANS = frozenset(
  {
    "complex_human_instruction",
    "guidance_interval",
    "height",
    "intermediate_timesteps",
    "use_resolution_binning",
    "width",
  }
)
_SPRINT_ONLY = frozenset({"intermediate_timesteps", "max_timesteps"})
_FLOW_ONLY = frozenset({"guidance_interval", "null_mask"})


@dataclasses.dataclass(kw_only=True)
class GenerationConfig(config.Config):
  """How images are made; a checkpoint keeps its own in generation_config.json.

  The defaults are those of SANA and SANA-1.5; `sprint` has SANA-Sprint's.

  Args:
    num_inference_steps: calls of the transformer.
    guidance_scale: 1 and below turn guidance off; for Sprint, an input of the
      transformer.
    height: in pixels, as `width`; None: what `sample_size` says.
    use_resolution_binning: generate at the closest size the checkpoint was
      trained at, then scale and crop. None: if the checkpoint has bins.
    max_sequence_length: tokens of the prompt that are kept.
    complex_human_instruction: lines put before every prompt; None: nothing.
    lowercase: whether prompts are lower-cased, as diffusers does.
    null_mask: which mask goes with the negative prompt: "own", as in diffusers,
      or the prompt's ("caption"), as in the original release.
    guidance_interval: guide only where low < sigma < high; None: always.
    max_timesteps: Sprint's first angle, in radians.
    intermediate_timesteps: Sprint's second angle in runs of two steps; None
      spaces them evenly.
  """

  num_inference_steps: int = 20
  guidance_scale: float = 4.5
  height: int | None = None
  width: int | None = None
  use_resolution_binning: bool | None = None
  max_sequence_length: int = 300
  complex_human_instruction: Sequence[str] | None = dataclasses.field(
    default_factory=text.default_instruction
  )
  lowercase: bool = True
  null_mask: str = "own"
  guidance_interval: tuple[float, float] | None = None
  max_timesteps: float = 1.57080
  intermediate_timesteps: float | None = 1.3

  @classmethod
  def sprint(cls) -> "GenerationConfig":
    return cls(num_inference_steps=2)

  def replace(self, options: Mapping[str, Any]) -> "GenerationConfig":
    """Returns these settings with some changed, checked.

    `intermediate_timesteps` is kept only for the two steps it is made for,
    unless it is among the options.

    Raises:
      TypeError: an unknown option.
      ValueError: a value that cannot be.
    """
    known = {field.name for field in dataclasses.fields(self)}
    if unknown := sorted(set(options) - known):
      raise TypeError(f"Unknown options {unknown}; there are {sorted(known)}.")
    given = {
      name: value
      for name, value in options.items()
      if value is not None or name in _NONE_MEANS
    }
    merged = dataclasses.replace(self, **given)
    if (
      merged.num_inference_steps != 2 and "intermediate_timesteps" not in given
    ):
      merged.intermediate_timesteps = None
    merged.validate()
    return merged

  def validate(self) -> None:
    for name in ("num_inference_steps", "max_sequence_length"):
      if getattr(self, name) < 1:
        raise ValueError(
          f"{name} must be at least 1, got {getattr(self, name)}."
        )
    if not math.isfinite(self.guidance_scale):
      raise ValueError(
        f"guidance_scale must be a finite number, got {self.guidance_scale}."
      )
    if self.null_mask not in ("own", "caption"):
      raise ValueError(
        f"null_mask must be 'own' or 'caption', got {self.null_mask!r}."
      )


class Options(TypedDict, total=False):
  """The fields of `GenerationConfig`, as keyword arguments of a call."""

  num_inference_steps: int | None
  guidance_scale: float | None
  height: int | None
  width: int | None
  use_resolution_binning: bool | None
  max_sequence_length: int | None
  complex_human_instruction: Sequence[str] | None
  lowercase: bool | None
  null_mask: str | None
  guidance_interval: tuple[float, float] | None
  max_timesteps: float | None
  intermediate_timesteps: float | None


def check_applicable(options: Mapping[str, Any], *, is_sprint: bool) -> None:
  """Refuses options that the checkpoint's sampler has no use for.

  Raises:
    ValueError: names them.
  """
  foreign = _FLOW_ONLY if is_sprint else _SPRINT_ONLY
  given = {name for name, value in options.items() if value is not None}
  if useless := sorted(given & foreign):
    kind = "a SANA-Sprint" if is_sprint else "not a SANA-Sprint"
    raise ValueError(
      f"{', '.join(useless)} cannot be used: this is {kind} checkpoint."
    )
