"""What is done before a run has anything on devices.

What cannot be is said before the work directory is this run's, what should be
known once its log is open.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from etils import epath

from sana_jax import checkpoint, sharding
from sana_jax import config as config_lib
from sana_jax.training import checks
from sana_jax.training import program as program_lib
from sana_jax.training import recipe as recipe_lib
from sana_jax.training import workdir as workdir_lib


class Plan(NamedTuple):
  """What is known of a run before it begins.

  Attributes:
    read_initial: reads what the run begins with; None: nothing is to be read.
    latest: step of the newest checkpoint; None: there is none to go on from.
  """

  mesh: jax.sharding.Mesh
  program: program_lib.Program
  read_initial: Callable[[], dict[str, Any]] | None
  latest: int | None


def prepare(
  config: config_lib.TrainConfig,
  workdir: epath.Path,
  recipe: recipe_lib.Recipe,
) -> Plan:
  """Checks all that can be checked without data and without devices' work.

  Raises:
    ValueError: something cannot be.
  """
  mesh = sharding.make_mesh(config.mesh)
  checks.check_batch(config, mesh)
  steps = checkpoint.saved_steps(workdir)
  latest = steps[-1] if steps else None
  checks.check_length(config, workdir, latest)
  program = program_lib.make_program(
    config,
    init=recipe.init,
    param_axes=recipe.param_axes,
    loss_fn=recipe.loss_fn,
    mesh=mesh,
  )
  read = None
  if recipe.initial is not None and latest is None:
    read = recipe.initial(program.state.params)
  return Plan(mesh, program, read, latest)


def take(
  config: config_lib.TrainConfig,
  workdir: epath.Path,
  recipe: recipe_lib.Recipe,
  plan: Plan,
  profile_steps: tuple[int, int] | None,
) -> None:
  """Makes the work directory this run's; logs what should be known of it.

  Raises:
    ValueError: it is another run's, or one of other data.
  """
  has_learned = plan.latest is not None
  workdir_lib.claim(config, workdir, has_learned=has_learned)
  checks.warn_of_length(config, plan.latest, profile_steps)
  if recipe.ledger is not None:
    recipe.ledger.begin(workdir, has_learned=has_learned)
