"""LoRA adapters of a SanaTransformer: fused into it, or attached to it."""

import functools
import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sana_jax import config as config_lib
from sana_jax import sharding, tree
from sana_jax.models import sana
from sana_jax.nn import low_rank
from sana_jax.weights import lora_files, mapping
from sana_jax.weights import sana as sana_weights

Lora = lora_files.Lora
Pair = lora_files.Pair
load = lora_files.load
save = lora_files.save

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


class _Piece(NamedTuple):
  """One update: x @ down @ up, added to outputs from `start` on."""

  down: np.ndarray
  up: np.ndarray
  start: int


class _Factors(NamedTuple):
  """All updates of one kernel, side by side on the rank axis."""

  down: np.ndarray
  up: np.ndarray


def fuse(
  model: sana.SanaTransformer, loras: Sequence[tuple[Lora, float]]
) -> sana.SanaTransformer:
  """Adds scale * alpha / rank * up @ down to the kernels of a transformer.

  The sum is made in float32 and rounded once, to the dtype of the kernel, where
  the kernel is. Parameters without an update are shared with `model`.

  Args:
    loras: adapters, each with its scale.

  Raises:
    ValueError: lists everything that does not fit the model.
  """
  updates = _factors(model, loras)
  kernels = _named_leaves(model, updates)
  placements = {name: kernel.sharding for name, kernel in kernels.items()}
  fused = jax.jit(_add, out_shardings=placements)(kernels, updates)
  return tree.map_with_names(lambda name, leaf: fused.get(name, leaf), model)


def attach(
  model: sana.SanaTransformer, loras: Sequence[tuple[Lora, float]]
) -> sana.SanaTransformer:
  """Returns a transformer whose layers carry the updates beside their kernels.

  All parameters are shared with `model`. Scales are part of the new parameters:
  the same adapters, attached with other scales, need no new compilation.

  Args:
    loras: adapters, each with its scale.

  Raises:
    ValueError: lists everything that does not fit the model.
  """
  attached = jax.tree.map(lambda leaf: leaf, model)
  for path, factors in _factors(model, loras).items():
    *parents, name, _ = path.split("/")
    parent = functools.reduce(getattr, parents, attached)
    linear = getattr(parent, name)
    down, up = (_beside(linear.kernel[...], factor) for factor in factors)
    setattr(parent, name, low_rank.LowRankLinear(linear, down, up))
  return attached


def _add(
  kernels: dict[str, jax.Array], updates: dict[str, _Factors]
) -> dict[str, jax.Array]:
  def add(matrices):
    kernel, down, up = matrices
    update = jnp.matmul(down, up, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)

  # Block by block: float32 copies of a whole stack would not fit.
  return {
    name: add((kernel, *updates[name]))
    if kernel.ndim == 2
    else jax.lax.map(add, (kernel, *updates[name]))
    for name, kernel in kernels.items()
  }


def _beside(kernel: jax.Array, factor: np.ndarray) -> jax.Array:
  """Puts a factor, whole, on every device that has a part of the kernel."""
  placement = kernel.sharding
  if isinstance(placement, jax.sharding.NamedSharding):
    placement = sharding.replicated(placement.mesh)
  return jax.device_put(factor.astype(kernel.dtype), placement)


def _factors(
  model: sana.SanaTransformer, loras: Sequence[tuple[Lora, float]]
) -> dict[str, _Factors]:
  """Returns the updates of every kernel that has any, scales included."""
  rules = _rules(model)
  targets = {
    name.removesuffix(".weight"): (rule, part)
    for rule in rules
    for part, name in enumerate(rule.names)
    if rule.path.endswith("/kernel")
  }
  shapes = mapping.expected_shapes(model, rules)
  problems = _problems(loras, targets, shapes, model.num_layers)
  if problems:
    raise ValueError("\n  ".join(["LoRA does not fit the model:", *problems]))
  pieces: dict[str, dict[int | None, list[_Piece]]] = defaultdict(
    lambda: defaultdict(list)
  )
  for lora, scale in loras:
    for module, pair in lora.pairs.items():
      rule, part = targets[module]
      pieces[rule.path][rule.index].append(_piece(rule, part, pair, scale))
  kernels = _named_leaves(model, pieces)
  return {
    path: _concatenate(kernels[path].shape, layers)
    for path, layers in pieces.items()
  }


def _named_leaves(model: Any, wanted: Collection[str]) -> dict[str, jax.Array]:
  names, leaves = tree.leaf_names(model), jax.tree.leaves(model)
  return {
    name: leaf
    for name, leaf in zip(names, leaves, strict=True)
    if name in wanted
  }


def _rules(model: sana.SanaTransformer) -> list[mapping.Rule]:
  # All that the names and layouts of weights depend on.
  config = config_lib.SanaConfig(
    patch_size=model.patch_size,
    num_layers=model.num_layers,
    guidance_embeds=model.guidance_embed is not None,
  )
  return [
    rule
    for rule in sana_weights.diffusers_rules(config)
    if rule.path.endswith(("/kernel", "/depth_kernel"))
  ]


def _piece(rule: mapping.Rule, part: int, pair: Pair, scale: float) -> _Piece:
  # A linear map of the inputs, like the weight itself, but to `rank` features.
  down = rule.to_jax(pair.down.astype(np.float32))
  up = pair.up.astype(np.float32).reshape(-1, pair.rank).T
  up = up * np.float32(scale * pair.alpha / pair.rank)
  return _Piece(down, up, part * up.shape[-1])


def _concatenate(
  shape: tuple[int, ...], layers: Mapping[int | None, list[_Piece]]
) -> _Factors:
  """Lines up the pieces of each layer; zeros fill up to the largest rank."""
  *stack, inputs, outputs = shape
  rank = max(
    sum(len(piece.up) for piece in pieces) for pieces in layers.values()
  )
  down = np.zeros((*stack, inputs, rank), np.float32)
  up = np.zeros((*stack, rank, outputs), np.float32)
  for index, pieces in layers.items():
    layer = ... if index is None else index
    first = 0
    for piece in pieces:
      last = first + len(piece.up)
      stop = piece.start + piece.up.shape[-1]
      down[layer][:, first:last] = piece.down
      up[layer][first:last, piece.start : stop] = piece.up
      first = last
  return _Factors(down, up)


def _problems(
  loras: Sequence[tuple[Lora, float]],
  targets: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  depth: int,
) -> list[str]:
  problems, unknown = [], False
  for lora, scale in loras:
    if not math.isfinite(scale):
      problems.append(f"{lora.source}: the scale must be finite, got {scale}")
    for module, pair in lora.pairs.items():
      expected = shapes.get(f"{module}.weight")
      if expected is None or module not in targets:
        problem = _unknown(module, targets, expected, depth)
        unknown = True
      else:
        problem = _misfit(pair, expected)
      if problem is not None:
        problems.append(f"{lora.source}: {module} {problem}")
  if unknown:
    known = {_BLOCK.sub(r"transformer_blocks.<block>.\2", m) for m in targets}
    problems.append("possible targets are " + ", ".join(sorted(known)))
  return problems


def _unknown(
  module: str,
  targets: Mapping[str, Any],
  expected: tuple[int, ...] | None,
  depth: int,
) -> str:
  if module in targets:
    return "has no kernel of real numbers in this model"
  if expected is not None:
    return "is a depthwise convolution, which cannot have a low-rank update"
  match = _BLOCK.fullmatch(module)
  if match and f"transformer_blocks.0.{match[2]}" in targets:
    return f"is beyond the {depth} blocks of the model"
  return "is not a linear layer of the model"


def _misfit(pair: Pair, expected: tuple[int, ...]) -> str | None:
  """Compares shapes; `expected` is that of the weight, outputs first."""
  down = (pair.rank, *expected[1:])
  up = (expected[0], pair.rank) + (1, 1) * (len(expected) == 4)
  if (pair.down.shape, pair.up.shape) == (down, up):
    return None
  return (
    f"has lora_A {pair.down.shape} and lora_B {pair.up.shape}, but the model's "
    f"weight {expected} needs {down} and {up}"
  )
