"""Settings of a generation: a checkpoint's own, and what a call changes."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from sana_jax import config, resolution, text

# Where None has a meaning of its own; elsewhere it is "not specified".
_NONE_MEANS = frozenset(
  {
    "aspect",
    "complex_human_instruction",
    "guidance_interval",
    "height",
    "intermediate_timesteps",
    "pag_applied_layers",
    "strength",
    "use_resolution_binning",
    "width",
  }
)
_SPRINT_ONLY = frozenset({"intermediate_timesteps", "max_timesteps"})
_FLOW_ONLY = frozenset(
  {
    *("controlnet_conditioning_scale", "guidance_interval", "null_mask"),
    *("pag_adaptive_scale", "pag_applied_layers", "pag_scale"),
  }
)


@dataclasses.dataclass(kw_only=True)
class GenerationConfig(config.Config):
  """How images are made; a checkpoint keeps its own in generation_config.json.

  The defaults are those of SANA and SANA-1.5; `sprint` has SANA-Sprint's.

  Args:
    num_inference_steps: calls of the transformer.
    guidance_scale: 1 and below turn guidance off; for Sprint, an input of the
      transformer.
    height: in pixels, as `width`; None: what `aspect` or an input image says,
      else `sample_size`.
    aspect: width to height, such as "16:9", in place of both.
    use_resolution_binning: generate at the closest size the checkpoint was
      trained at, then scale and crop. None: if the checkpoint has bins.
    max_sequence_length: tokens of the prompt that are kept.
    complex_human_instruction: lines put before every prompt; None: nothing.
    lowercase: whether prompts are lower-cased, as diffusers does.
    null_mask: which mask goes with the negative prompt: "own", as in diffusers,
      or the prompt's ("caption"), as in the original release.
    guidance_interval: (low, high) in [0, 1]: guide only where low < sigma <
      high; None, like (0, 1): always.
    pag_scale: of perturbed-attention guidance; 0 turns it off.
    pag_adaptive_scale: how much `pag_scale` falls with each of the 1000
      timesteps.
    pag_applied_layers: blocks whose attention is perturbed; None: what the
      published checkpoints of this depth use.
    strength: of image-to-image, in (0, 1]: the share of the steps that is run;
      None: 0.6, 0.5 for Sprint, or 1 with a mask.
    composite_pixels: with a mask, put the given image's pixels back where the
      mask is black.
    controlnet_conditioning_scale: multiplies what a ControlNet adds.
    max_timesteps: Sprint's first angle, in radians.
    intermediate_timesteps: Sprint's second angle in runs of two steps; None
      spaces them evenly.
  """

  num_inference_steps: int = 20
  guidance_scale: float = 4.5
  height: int | None = None
  width: int | None = None
  aspect: str | None = None
  use_resolution_binning: bool | None = None
  max_sequence_length: int = 300
  complex_human_instruction: Sequence[str] | None = dataclasses.field(
    default_factory=text.default_instruction
  )
  lowercase: bool = True
  null_mask: str = "own"
  guidance_interval: tuple[float, float] | None = None
  pag_scale: float = 0.0
  pag_adaptive_scale: float = 0.0
  pag_applied_layers: tuple[int, ...] | None = None
  strength: float | None = None
  composite_pixels: bool = True
  controlnet_conditioning_scale: float = 1.0
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
    if "aspect" in given and given["aspect"] is not None:
      # Sizes of the checkpoint give way; those of the same call do not.
      given = {"height": None, "width": None} | given
    elif given.get("height") or given.get("width"):
      given = {"aspect": None} | given
    merged = dataclasses.replace(self, **given)
    if (
      merged.num_inference_steps != 2 and "intermediate_timesteps" not in given
    ):
      merged.intermediate_timesteps = None
    merged.validate()
    return merged

  def validate(self) -> None:
    for name in ("num_inference_steps", "max_sequence_length"):
      value = getattr(self, name)
      if not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
      if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    for name in ("height", "width"):
      value = getattr(self, name)
      if value is not None and not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be a whole number, got {value!r}.")
    if self.guidance_interval is not None:
      _check_interval(self.guidance_interval)
    for name in (
      *("guidance_scale", "pag_scale", "pag_adaptive_scale"),
      "controlnet_conditioning_scale",
    ):
      value = getattr(self, name)
      if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value}.")
    for name in ("pag_scale", "pag_adaptive_scale"):
      value = getattr(self, name)
      if value < 0:
        raise ValueError(f"{name} must not be negative, got {value}.")
    if self.strength is not None and not 0 < self.strength <= 1:
      raise ValueError(f"strength must be in (0, 1], got {self.strength}.")
    if self.aspect is not None:
      resolution.parse_aspect(self.aspect)
      if self.height is not None or self.width is not None:
        raise ValueError(
          f"aspect {self.aspect!r} cannot go with height or width; give one or "
          "the other."
        )
    if self.null_mask not in ("own", "caption"):
      raise ValueError(
        f"null_mask must be 'own' or 'caption', got {self.null_mask!r}."
      )


def _check_interval(interval: Any) -> None:
  ends = tuple(interval) if isinstance(interval, list | tuple) else ()
  if len(ends) != 2 or not all(isinstance(e, numbers.Real) for e in ends):
    raise ValueError(
      f"guidance_interval must be two numbers (low, high), got {interval!r}."
    )
  if not 0 <= ends[0] < ends[1] <= 1:
    raise ValueError(
      f"guidance_interval must have 0 <= low < high <= 1, got {interval}."
    )


def is_guided(settings: GenerationConfig, *, is_sprint: bool) -> bool:
  """Says whether a negative prompt is read, for classifier-free guidance."""
  return settings.guidance_scale > 1 and not is_sprint


def pag_layers(settings: GenerationConfig, num_layers: int) -> tuple[int, ...]:
  """Returns the blocks that perturbed-attention guidance perturbs.

  None when it is off. By default block 14 of the 28 of SANA 0.6B, block 8 of
  deeper and of wider models, as they were published, and the middle of smaller
  ones.

  Raises:
    ValueError: a block that the transformer does not have.
  """
  if settings.pag_scale == 0:
    return ()
  layers = settings.pag_applied_layers
  if layers is None:
    return (14 if num_layers == 28 else min(8, num_layers // 2),)
  wrong = [layer for layer in layers if not 0 <= layer < num_layers]
  if wrong or not layers:
    raise ValueError(
      f"pag_applied_layers is {tuple(layers)}; expected some of the blocks 0 "
      f"to {num_layers - 1}."
    )
  return tuple(layers)


class Options(TypedDict, total=False):
  """The fields of `GenerationConfig`, as keyword arguments of a call."""

  num_inference_steps: int | None
  guidance_scale: float | None
  height: int | None
  width: int | None
  aspect: str | None
  use_resolution_binning: bool | None
  max_sequence_length: int | None
  complex_human_instruction: Sequence[str] | None
  lowercase: bool | None
  null_mask: str | None
  guidance_interval: tuple[float, float] | None
  pag_scale: float | None
  pag_adaptive_scale: float | None
  pag_applied_layers: tuple[int, ...] | None
  strength: float | None
  composite_pixels: bool | None
  controlnet_conditioning_scale: float | None
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
