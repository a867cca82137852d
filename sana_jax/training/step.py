"""One optimisation step: state in, state out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from sana_jax import tree
from sana_jax.training import accumulation as accumulation_lib
from sana_jax.training import scalars as scalars_lib

LossFn = Callable[[Any, Any, jax.Array, Any], tuple[Array, scalars_lib.Scalars]]


class TrainState(NamedTuple):
  """Everything a run needs to continue; all leaves are arrays.

  Attributes:
    step: batches seen, those included whose update was skipped.
    ema: the average of the parameters; None: none is kept.
    skipped: updates that were skipped because something was not finite, or
      undone because a run went back to an earlier checkpoint.
  """

  step: Int[Array, ""]
  params: Any
  ema: Any
  opt_state: Any
  skipped: Int[Array, ""]

  @property
  def averaged(self) -> Any:
    """What is sampled and exported: the parameters where none is kept."""
    return self.params if self.ema is None else self.ema


def init_state(
  params: Any, tx: optax.GradientTransformation, *, averages: bool = True
) -> TrainState:
  """Starts at step 0 with the average, if any, equal to the parameters."""
  # A copy: the state is donated, and one buffer cannot be donated twice.
  ema = jax.tree.map(jnp.copy, params) if averages else None
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, ema, tx.init(params), jnp.copy(zero))


def make_train_step(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  learning_rate: optax.Schedule,
  ema_decay: float,
  accumulation: int = 1,
  frozen: Sequence[str] = (),
  fetch: Callable[[Any], Any] | None = None,
) -> Callable[..., tuple[TrainState, scalars_lib.Scalars]]:
  """Returns step(state, fixed, key, batch) -> (state, scalars).

  The step's randomness is fold_in(key, state.step): a resumed run draws what
  the uninterrupted run would have drawn. The average follows the new
  parameters, with a decay of min(ema_decay, (1 + t) / (10 + t)) so that it
  forgets the initialisation early. A state without an average stays without.

  When the loss, or the norm of the gradient or of the update, is not finite,
  parameters, optimiser and average stay as they are; the step and `skipped` go
  on. (A choice between old and new for every array; under lax.cond XLA keeps
  more of them at once.)

  Scalars: `loss`, `learning_rate` of this update, `skipped` (0 or 1),
  `param_norm` before the update, `grad_norm` before clipping and
  `grad_norm/<group>` (see `group_of`), and what `loss_fn` tells.

  Args:
    learning_rate: of the n-th update; to be reported, `tx` applies its own.
    accumulation: parts of the batch, see `accumulation.value_and_grad`.
    frozen: patterns of parameters without gradient.
    fetch: brings (ema, opt_state) to the device from elsewhere. That is begun
      once there are gradients, so that they do not lie beside activations.
  """

  def trained_loss(params: Any, fixed: Any, key: jax.Array, batch: Any):
    return loss_fn(_stop(params, frozen), fixed, key, batch)

  grad_fn = accumulation_lib.value_and_grad(trained_loss, accumulation)

  def train_step(state: TrainState, fixed: Any, key: jax.Array, batch: Any):
    step_key = jax.random.fold_in(key, state.step)
    (loss, aux), grads = grad_fn(state.params, fixed, step_key, batch)
    grad_norm = optax.tree.norm(grads)
    if fetch is not None:
      kept = (state.ema, state.opt_state)
      kept = _fetch_after(grad_norm, state.step, fetch, kept)
      state = state._replace(ema=kept[0], opt_state=kept[1])
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    # A finite gradient is not enough: an optimiser divides, and multiplies.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    finite &= jnp.isfinite(optax.tree.norm(updates))
    params = optax.apply_updates(state.params, updates)
    ema = None
    if state.ema is not None:
      time = state.step.astype(jnp.float32)
      decay = jnp.minimum(ema_decay, (1 + time) / (10 + time))
      ema = optax.incremental_update(params, state.ema, 1 - decay)
    params, ema, opt_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (params, ema, opt_state),
      (state.params, state.ema, state.opt_state),
    )
    skipped = 1 - finite.astype(jnp.int32)
    scalars = {
      "loss": loss,
      "grad_norm": grad_norm,
      "learning_rate": jnp.float32(learning_rate(state.step - state.skipped)),
      "skipped": skipped,
      "param_norm": optax.tree.norm(state.params),
      **_group_norms(grads, frozen),
      **_told(aux, finite),
    }
    new = TrainState(
      state.step + 1, params, ema, opt_state, state.skipped + skipped
    )
    return new, scalars

  return train_step


def _fetch_after(
  norm: Float[Array, ""],
  step: Int[Array, ""],
  fetch: Callable[[Any], Any],
  kept: Any,
) -> Any:
  """Returns fetch(kept), which is not begun before the norm is known.

  XLA starts copies from the host as early as it can, also past a barrier, but
  not out of a branch. That a step is not negative is more than it can know.
  """

  def never(kept: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, fetch(kept))

  return jax.lax.cond(norm + step < 0, never, fetch, kept)


def group_of(name: str) -> str:
  """The part of a model that a parameter is in.

  "transformer/ffn" of "transformer/blocks/ffn/point/kernel": what all blocks
  have alike is one part, and so are all norms; anything else is by what its
  component calls it.
  """
  component, *parts = [part for part in name.split("/") if part != "blocks"]
  part = "norms" if "norm" in "".join(parts[:1]) else "/".join(parts[:1])
  return f"{component}/{part}" if part else component


def _told(
  aux: scalars_lib.Scalars, finite: Bool[Array, ""]
) -> scalars_lib.Scalars:
  """Empties the ratios of a skipped step: they would spoil the sums."""
  return {
    name: jax.tree.map(lambda x: jnp.where(finite, x, 0), value)
    if isinstance(value, scalars_lib.Ratio)
    else value
    for name, value in aux.items()
  }


def _group_norms(
  grads: Any, frozen: Sequence[str]
) -> Mapping[str, Float[Array, ""]]:
  groups: dict[str, list[jax.Array]] = {}
  for name, leaf in _named(grads):
    if not tree.matches(name, frozen):
      groups.setdefault(f"grad_norm/{group_of(name)}", []).append(leaf)
  return {group: optax.tree.norm(leaves) for group, leaves in groups.items()}


def _stop(params: Any, frozen: Sequence[str]) -> Any:
  def stop(name: str, leaf: jax.Array) -> jax.Array:
    return jax.lax.stop_gradient(leaf) if tree.matches(name, frozen) else leaf

  return tree.map_with_names(stop, params) if frozen else params


def _named(values: Any):
  return zip(tree.leaf_names(values), jax.tree.leaves(values), strict=True)
