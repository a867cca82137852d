"""Which of a picture's captions it is trained with."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float

from sana_jax.data import records

METHODS = ("first", "random", "proportion", "clip_power", "clip_softmax")
PROMPT = "prompt"

# The reference divides by no temperature below this one.
_MIN_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class CaptionSelection:
  """How a caption is chosen.

  Attributes:
    method: "first": the caption named "prompt", else the first. "random": all
      alike. "proportion": by `proportions`. "clip_power": with probability
      proportional to score^(1 / temperature), as the reference's code does.
      "clip_softmax": to exp(score / temperature), as its paper says.
    temperature: of the two by score; the power law knows none below 0.01.
    threshold: of the two by score: captions of lower scores are not drawn;
      when all are lower, the one with the highest score is taken.
    proportions: weight of every caption name; others are never drawn.

  Source: NVlabs/Sana diffusion/data/datasets/sana_data_multi_scale.py; SANA,
    arXiv:2410.10629, section 3.
  """

  method: Literal[
    "first", "random", "proportion", "clip_power", "clip_softmax"
  ] = "first"
  temperature: float = 1.0
  threshold: float = 0.0
  proportions: Mapping[str, float] = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    problems = list(_problems(self))
    if problems:
      raise ValueError("CaptionSelection: " + "; ".join(problems) + ".")


def _problems(selection: CaptionSelection):
  if selection.method not in METHODS:
    yield (
      f"method must be one of {', '.join(METHODS)}, got {selection.method!r}"
    )
  if not 0 < selection.temperature < np.inf:
    yield (
      f"temperature must be positive and finite, got {selection.temperature}"
    )
  if not 0 <= selection.threshold < np.inf:
    yield (
      f"threshold must be at least 0 (scores are CLIP's times 100), got "
      f"{selection.threshold}"
    )
  weights = list(selection.proportions.values())
  if any(not 0 <= weight < np.inf for weight in weights):
    yield f"proportions must be at least 0, got {dict(selection.proportions)}"
  elif selection.method == "proportion" and not sum(weights) > 0:
    yield (
      "proportions must give a caption name a positive weight, got "
      f"{dict(selection.proportions)}"
    )
  by_score = selection.method.startswith("clip_")
  if selection.threshold and not by_score:
    yield f"threshold has no effect on method {selection.method!r}"
  if selection.temperature != 1.0 and not by_score:
    yield f"temperature has no effect on method {selection.method!r}"
  if weights and selection.method != "proportion":
    yield f"proportions have no effect on method {selection.method!r}"


def choose(
  captions: Sequence[records.Caption],
  rng: np.random.Generator,
  selection: CaptionSelection,
) -> str:
  """Draws one caption's text.

  Without what the method needs (no caption has a score, or none a weight) it
  is the caption named "prompt", else the first; a picture without captions
  has the empty text.

  Args:
    rng: advanced by one draw at most; equal states give equal captions.
  """
  if not captions:
    return ""
  if selection.method == "first":
    return prompt(captions).text
  if selection.method == "random":
    return captions[rng.integers(len(captions))].text
  if selection.method == "proportion":
    weights = np.array(
      [selection.proportions.get(caption.name, 0.0) for caption in captions]
    )
    if not weights.any():
      return prompt(captions).text
    return captions[rng.choice(len(captions), p=weights / weights.sum())].text
  return _by_score(captions, rng, selection)


def probabilities(
  scores: Float[np.ndarray, "k"], selection: CaptionSelection
) -> Float[np.ndarray, "k"]:
  """Returns how likely captions of these scores, all admitted, are drawn."""
  if selection.method == "clip_power":
    temperature = max(selection.temperature, _MIN_TEMPERATURE)
    # A score of zero has no logarithm, and no chance beside a positive one.
    scores = np.log(np.maximum(scores, np.finfo(np.float64).tiny))
  else:
    temperature = selection.temperature
  weights = np.exp((scores - scores.max()) / temperature)
  return weights / weights.sum()


def _by_score(
  captions: Sequence[records.Caption],
  rng: np.random.Generator,
  selection: CaptionSelection,
) -> str:
  scored = [caption for caption in captions if caption.score is not None]
  if not scored:
    return prompt(captions).text
  admitted = [c for c in scored if c.score >= selection.threshold]
  if not admitted:
    return max(scored, key=lambda caption: caption.score).text
  scores = np.array([caption.score for caption in admitted], np.float64)
  drawn = rng.choice(len(admitted), p=probabilities(scores, selection))
  return admitted[drawn].text


def prompt(captions: Sequence[records.Caption]) -> records.Caption:
  """Returns the caption named "prompt", else the first; there must be one."""
  return next((c for c in captions if c.name == PROMPT), captions[0])
