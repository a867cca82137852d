"""What a kind of training is, for the loop that all kinds share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from sana_jax import sharding
from sana_jax.data import loader, names
from sana_jax.training import compilations
from sana_jax.training import ledger as ledger_lib
from sana_jax.training import step as step_lib


class Recipe(NamedTuple):
  """What is trained.

  Attributes:
    init: key -> {component name: module}.
    param_axes: {component name: sharding rows of that module}.
    frozen: {name: arrays} the loss needs but does not train; what has sharding
      rows is sharded by them.
    loss_fn: (params, frozen, key, batch) -> (loss, scalars).
    batches: a host's part of the batches of all steps.
    sample: (averaged params, frozen) -> uint8 picture to look at; called, like
      `export`, by one process, with arrays that this process holds whole;
      None: there is nothing to look at.
    export: (averaged params, frozen, directory) -> None; the run's product;
      None: it has none.
    num_shapes: how many shapes batches may have; each is compiled.
    name_shape: what the shape of a batch is called in the log.
    name_batch: see `names.NameBatch`; None: records have no names.
    flops_per_image: operations that a batch of this shape costs per image, for
      the model itself (no rematerialisation); None: they are not known.
    initial: abstract parameters, shardings included -> what reads those that a
      run begins with in place of `init`'s random ones, so structured and
      placed; what is wrong with them, as far as it can be, is raised at once.
    ledger: of the data, if they may change or be used in part.
  """

  init: Callable[[jax.Array], dict[str, Any]]
  param_axes: dict[str, sharding.ParamAxes]
  frozen: dict[str, Any]
  loss_fn: step_lib.LossFn
  batches: loader.HostBatches
  sample: Callable[[Any, Any], np.ndarray] | None
  export: Callable[[Any, Any, epath.Path], None] | None
  num_shapes: int = 1
  name_shape: Callable[[Any], str] = compilations.name_leaves
  ledger: ledger_lib.Ledger | None = None
  name_batch: names.NameBatch | None = None
  flops_per_image: Callable[[Any], float] | None = None
  initial: Callable[[dict[str, Any]], Callable[[], dict[str, Any]]] | None = (
    None
  )
