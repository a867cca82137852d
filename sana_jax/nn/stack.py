"""Running a stack of identical blocks whose parameters share a leading axis."""

from collections.abc import Callable
from typing import Any

import jax
import jax.ad_checkpoint
import jax.numpy as jnp

from sana_jax import sharding
from sana_jax.nn import layers

REMAT_POLICIES = ("none", "full", "dots", "offload")

# What rematerialisation knows by this name that a block starts from.
_BLOCK_INPUT = "block_input"


def make_blocks(make_block: Callable[[Any], Any], key: jax.Array, depth: int):
  """Builds `depth` blocks as one module whose leaves are stacked on axis 0."""
  return jax.vmap(make_block)(jax.random.split(key, depth))


def checkpointed(
  function: Callable[..., Any], remat: str
) -> Callable[..., Any]:
  """Returns `function` with its backward pass told what to keep.

  Args:
    remat: "none" recomputes nothing (but gathers sharded kernels again), "full"
      recomputes everything inside, "dots" keeps the matrix products; "offload"
      is "full", with what a block starts from kept in the host's memory.

  Raises:
    ValueError: an unknown `remat`.
  """
  if remat == "none":
    if sharding.shards("embed") == 1:
      return function
    # Kept for the backward pass, gathered kernels would undo the sharding.
    policy = jax.checkpoint_policies.save_anything_except_these_names(
      layers.GATHERED
    )
    return jax.checkpoint(function, policy=policy)
  if remat == "full":
    return jax.checkpoint(function)
  if remat == "dots":
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(function, policy=policy)
  if remat == "offload":
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=[_BLOCK_INPUT],
      offload_src="device",
      offload_dst="pinned_host",
    )
    return jax.checkpoint(function, policy=policy)
  raise ValueError(f"remat must be one of {REMAT_POLICIES}, got {remat!r}.")


def block_input(x: jax.Array) -> jax.Array:
  """Tells `checkpointed` functions what "offload" keeps for them."""
  return jax.ad_checkpoint.checkpoint_name(x, _BLOCK_INPUT)


def run_blocks(
  block_fn: Callable[..., Any],
  x: Any,
  blocks: Any,
  *per_block: Any,
  scan: bool,
  remat: str,
) -> Any:
  """Applies x = block_fn(block, x, *slices) for every block in order.

  Args:
    blocks: a pytree with a leading block axis on every leaf.
    per_block: further pytrees with that leading axis (or None), sliced
      alongside.
    scan: True compiles one block (fast compile; accelerators); False unrolls
      (about a third faster on CPU for small models).
    remat: what the backward pass keeps of each block; see `checkpointed`.

  Raises:
    ValueError: an unknown `remat`.
  """
  return collect_blocks(
    lambda *args: (block_fn(*args), None),
    x,
    blocks,
    *per_block,
    scan=scan,
    remat=remat,
  )[0]


def collect_blocks(
  block_fn: Callable[..., tuple[Any, Any]],
  x: Any,
  blocks: Any,
  *per_block: Any,
  scan: bool,
  remat: str,
) -> tuple[Any, Any]:
  """Applies x, output = block_fn(block, x, *slices) for every block in order.

  Returns the last x and all outputs, stacked. Arguments and errors are those of
  `run_blocks`.
  """

  def body(carry, sliced):
    block, slices = sliced
    carry = jax.tree.map(block_input, carry)
    return block_fn(block, carry, *slices)

  body = checkpointed(body, remat)
  if scan:
    return jax.lax.scan(body, x, (blocks, per_block))
  outputs = []
  for sliced in _unstack((blocks, per_block)):
    x, output = body(x, sliced)
    outputs.append(output)
  return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def _unstack(stacked: Any) -> list[Any]:
  """Splits every leaf along its leading axis.

  By one `split` a leaf, whose derivative is one concatenation; indexing block
  by block would add up as many full-size, mostly zero gradients.
  """
  leaves, structure = jax.tree.flatten(stacked)
  depth = leaves[0].shape[0]
  parts = [jax.lax.split(leaf, (1,) * depth) for leaf in leaves]
  return [
    structure.unflatten([part[i].reshape(part[i].shape[1:]) for part in parts])
    for i in range(depth)
  ]
