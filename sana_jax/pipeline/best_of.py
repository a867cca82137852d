"""Best of n: many candidates a prompt, the one a scorer likes is kept."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from sana_jax.pipeline import checks, text_to_image
from sana_jax.pipeline import output as output_lib

# (images in [0, 1], the prompt of each) -> one score an image, more is better.
Scorer = Callable[
  [Float[np.ndarray, "n height width 3"], Sequence[str]],
  Float[np.ndarray, " n"],
]


class Best(NamedTuple):
  """The winners, in the order of the prompts.

  Attributes:
    image_index: their numbers among the images of the seed: with them, a call
      of the pipeline makes a winner again.
    scores: of all candidates.
  """

  output: output_lib.SanaOutput
  image_index: Int[np.ndarray, " prompts"]
  scores: Float[np.ndarray, "prompts n"]


def best_of(
  pipe: text_to_image.SanaPipeline,
  prompts: str | Sequence[str],
  *,
  n: int,
  scorer: Scorer,
  image_index: int = 0,
  negative_prompt: str | Sequence[str] = "",
  **call: Any,
) -> Best:
  """Makes n images of each prompt and keeps the one with the highest score.

  Candidates of one prompt are made in one batch.

  Args:
    scorer: such as a CLIP score or an aesthetic model.
    image_index: number of the first prompt's first candidate; candidate j of
      prompt i has number image_index + i n + j.
    negative_prompt: one for all, or one for each prompt.
    call: further arguments of `SanaPipeline.__call__`.

  Raises:
    TypeError: `num_images_per_prompt`, which n is here.
    ValueError: n below 1, or scores that are not one finite number an image.

  Source: inference-time scaling, SANA-1.5, arXiv:2501.18427, section 2.4.
  """
  if n < 1:
    raise ValueError(f"n must be at least 1, got {n}.")
  if "num_images_per_prompt" in call:
    raise TypeError(
      "num_images_per_prompt cannot go with best_of, which keeps one of n."
    )
  prompts = checks.prompt_list(prompts)
  negatives = checks.negative_prompt_list(
    negative_prompt, len(prompts), is_sprint=pipe.is_sprint
  )
  chosen, numbers, all_scores, lengths = [], [], [], []
  for i, prompt in enumerate(prompts):
    first = image_index + i * n
    output = pipe(
      prompt,
      negative_prompt=negatives[i % len(negatives)],
      num_images_per_prompt=n,
      image_index=first,
      **call,
    )
    scores = _scores(scorer, output.images, [prompt] * n)
    best = int(np.argmax(scores))
    chosen.append((output.images[best], output.latents[best]))
    numbers.append(first + best)
    lengths.append(output.text_length)
    all_scores.append(scores)
  columns = (np.stack(column) for column in zip(*chosen, strict=True))
  return Best(
    output_lib.SanaOutput(*columns, text_length=max(lengths)),
    np.array(numbers),
    np.stack(all_scores),
  )


def _scores(scorer: Scorer, images, prompts) -> Float[np.ndarray, " n"]:
  scores = np.asarray(scorer(images, prompts), np.float64)
  if scores.shape != (len(prompts),) or not np.isfinite(scores).all():
    raise ValueError(
      f"The scorer returned {scores.tolist()} for {len(prompts)} images; "
      "expected one finite number an image."
    )
  return scores
