"""One optimisation step: state in, state out."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Metrics = dict[str, Float[Array, ""] | Int[Array, ""]]
LossFn = Callable[[Any, Any, jax.Array, Any], tuple[Array, Metrics]]


class TrainState(NamedTuple):
  """Everything a run needs to continue; all leaves are arrays."""

  step: Int[Array, ""]
  params: Any
  ema: Any
  opt_state: Any
  skipped: Int[Array, ""]


def init_state(params: Any, tx: optax.GradientTransformation) -> TrainState:
  """Starts at step 0 with the average equal to the parameters."""
  # A copy: the state is donated, and one buffer cannot be donated twice.
  ema = jax.tree.map(jnp.copy, params)
  zero = jnp.zeros((), jnp.int32)
  return TrainState(zero, params, ema, tx.init(params), jnp.zeros_like(zero))


def make_train_step(
  loss_fn: LossFn, tx: optax.GradientTransformation, ema_decay: float
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns step(state, frozen, key, batch) -> (state, metrics).

  The step's randomness is fold_in(key, state.step): a resumed run draws what
  the uninterrupted run would have drawn. The average follows the new
  parameters, with a decay of min(ema_decay, (1 + t) / (10 + t)) so that it
  forgets the initialisation early.
  """

  def train_step(state: TrainState, frozen: Any, key: jax.Array, batch: Any):
    step_key = jax.random.fold_in(key, state.step)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, aux), grads = grad_fn(state.params, frozen, step_key, batch)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    time = state.step.astype(jnp.float32)
    decay = jnp.minimum(ema_decay, (1 + time) / (10 + time))
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    norm = optax.tree.norm(grads)
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
    params, ema, opt_state = jax.tree.map(
      lambda new, old: jnp.where(bad, old, new),
      (params, ema, opt_state),
      (state.params, state.ema, state.opt_state),
    )
    skipped = bad.astype(jnp.int32)
    metrics = {"loss": loss, "grad_norm": norm, "skipped": skipped, **aux}
    new = TrainState(
      state.step + 1, params, ema, opt_state, state.skipped + skipped
    )
    return new, metrics

  return train_step
