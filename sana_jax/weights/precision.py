"""Was a checkpoint trained in float16, with its overflow as part of the model?

The first SANA checkpoints were: their activations reach half a million, float16
cut them off at 65504, and the weights came to rely on it. Run in bfloat16 or
float32 without that limit they draw something else.
"""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import ml_dtypes
import numpy as np
from absl import logging

from sana_jax import config as config_lib
from sana_jax.weights import zoo

_CLAMPS = "clamping self-attention outputs at +-65504"
_FLAG = "fp16_clamp=True or fp16_clamp=False decides"

_PUBLISHED_WIDTHS = frozenset(e.make_config().width for e in zoo.ENTRIES)


class Decision(NamedTuple):
  """What is known, and what follows.

  Attributes:
    clamp: whether self-attention outputs are to be limited.
    certain: False: a guess, which the user should know of.
    reason: one line that says why.
  """

  clamp: bool
  certain: bool
  reason: str


def trained_in_fp16(
  config: config_lib.SanaConfig,
  *,
  names: Iterable[str] = (),
  variants: Collection[str | None] = (),
  dtypes: Collection[np.dtype] = (),
) -> Decision:
  """Decides from all there is to know of a checkpoint, the surest first.

  Args:
    names: paths or repositories, for the table of published checkpoints.
    variants: of the files beside the weights, as `files.variants` lists them.
    dtypes: of the tensors in the file.
  """
  for entry in filter(None, map(zoo.lookup, names)):
    return _known(entry.precision == "fp16", f" ({entry.name})")
  if (mark := _bf16_mark(config)) is not None:
    return _known(False, f" ({mark})")
  if config.width not in _PUBLISHED_WIDTHS:
    return Decision(
      False, True, f"no published model is {config.width} wide: no clamping"
    )
  if config.width == config_lib.sana_600m().width:
    return _known(True, " (0.6B without query and key norms)")
  half = np.dtype(np.float16) in dtypes or "fp16" in variants
  brain = np.dtype(ml_dtypes.bfloat16) in dtypes or "bf16" in variants
  if half != brain:
    return _known(half, " (by the type of its files)")
  return Decision(
    True,
    False,
    "cannot tell whether this checkpoint was trained in fp16 or bf16: "
    f"{_CLAMPS}; {_FLAG}",
  )


def choose_clamp(decision: Decision, requested: bool | None) -> bool:
  """Returns what was requested, or else the decision, and logs why."""
  if requested is not None:
    logging.info("fp16_clamp=%s as requested", requested)
    return requested
  log = logging.info if decision.certain else logging.warning
  log("%s", decision.reason)
  return decision.clamp


def _known(fp16: bool, why: str) -> Decision:
  if fp16:
    return Decision(True, True, f"fp16-trained checkpoint{why}: {_CLAMPS}")
  return Decision(False, True, f"not trained in fp16{why}: no clamping")


def _bf16_mark(config: config_lib.SanaConfig) -> str | None:
  """Names the part that only models trained in bfloat16 have."""
  if config.qk_norm is not None:
    return "query and key norms"
  if config.interpolation_scale is not None:
    return "positional embedding"
  return None
