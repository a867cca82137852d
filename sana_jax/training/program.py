"""What is compiled for a run: by the loop, and by whoever plans one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from sana_jax import config as config_lib
from sana_jax import sharding
from sana_jax.training import optim, placement
from sana_jax.training import step as step_lib


class Program(NamedTuple):
  """The functions of a run, jitted for a mesh; nothing is computed yet.

  Attributes:
    tx: the optimiser.
    init: key -> TrainState, born sharded.
    begin: params -> TrainState that begins with them; donates them.
    step: (state, frozen, key, batch) -> (TrainState, scalars); donates state.
    state: abstract TrainState, shardings included.
  """

  tx: optax.GradientTransformation
  init: jax.stages.Wrapped
  begin: jax.stages.Wrapped
  step: jax.stages.Wrapped
  state: step_lib.TrainState


def make_program(
  config: config_lib.TrainConfig,
  *,
  init: Callable[[jax.Array], dict[str, Any]],
  param_axes: Mapping[str, sharding.ParamAxes],
  loss_fn: step_lib.LossFn,
  mesh: jax.sharding.Mesh,
) -> Program:
  """Builds the functions of a run.

  Args:
    init: key -> {component name: module}.
    param_axes: {component name: sharding rows of that module}.
    loss_fn: (params, frozen, key, batch) -> (loss, scalars).

  Raises:
    ValueError: an axis of the mesh leaves most parameters whole.
  """
  length = {"num_steps": config.num_steps, "batch_size": config.batch_size}
  tx = optim.make_optimizer(config.optim, **length, param_axes=param_axes)

  def begin(params: dict[str, Any]) -> step_lib.TrainState:
    return step_lib.init_state(params, tx, averages=config.ema_decay > 0)

  def init_state(key: jax.Array) -> step_lib.TrainState:
    return begin(init(key))

  abstract = jax.eval_shape(init_state, jax.random.key(0))
  sharding.check_every_axis_cuts(abstract.params, param_axes, mesh)
  offload = config.hardware.offload
  shardings = placement.state_shardings(abstract, param_axes, mesh, offload)
  on_device = placement.state_shardings(abstract, param_axes, mesh)
  state = jax.tree.map(
    lambda leaf, place: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=place
    ),
    abstract,
    shardings,
  )

  def loss_of_shards(params, *args):
    # The derivative of the constraint is one on the gradients: those of a
    # parameter are cut like it before anything is made of them.
    params = jax.lax.with_sharding_constraint(params, shardings.params)
    return loss_fn(params, *args)

  def fetch(kept: tuple[Any, Any]) -> tuple[Any, Any]:
    return jax.device_put(kept, (on_device.ema, on_device.opt_state))

  train_step = step_lib.make_train_step(
    loss_of_shards,
    tx,
    learning_rate=optim.make_schedule(config.optim, **length),
    ema_decay=config.ema_decay,
    accumulation=config.optim.accumulation,
    frozen=config.optim.frozen,
    fetch=fetch if offload else None,
  )

  def step_on_mesh(state, frozen, key, batch):
    with sharding.use(mesh):
      return train_step(state, frozen, key, batch)

  step = jax.jit(
    step_on_mesh,
    donate_argnums=0,
    # Pinned: what XLA would choose for the outputs of step 1 may differ from
    # the inputs, and step 2 would be compiled again.
    out_shardings=(shardings, sharding.replicated(mesh)),
    compiler_options=config.hardware.compiler_options or None,
  )
  # Jitted, so that large parameters are born sharded on the devices.
  return Program(
    tx,
    jax.jit(init_state, out_shardings=shardings),
    jax.jit(begin, out_shardings=shardings, donate_argnums=0),
    step,
    state,
  )
