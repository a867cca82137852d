"""One of two processes of four devices that train stages until asked to stop.

python -m tests.training.stages_worker PROCESS PORT DIRECTORY WHEN

SIGTERM comes to one of them WHEN the last step of the first stage is the one to
stop at ("step"), while that stage is exported ("export"), or after step 2 of
the second was restored and before another is made ("resumed").
"""

import os
import signal
import sys
import time

from absl import logging

from sana_jax.training import launch, loop, stages
from tests.training import test_loop, test_stages

# Until all processes have heard of a signal: it is looked for once a second.
_NOTICE = 8


class Ledger:
  """Is told of steps by the loop; pauses after one of a stage."""

  def __init__(self, pause, stage, step):
    self._pause, self._after = pause, (stage, step)

  def begin(self, workdir, *, has_learned):
    self._stage = workdir.name

  def note(self, step):
    if (self._stage, step) == self._after:
      self._pause()


def main() -> None:
  process, port = map(int, sys.argv[1:3])
  directory, when = sys.argv[3:]
  logging.set_verbosity(logging.INFO)
  launch.join(
    launch.Cluster("coordinator", 2, process, f"localhost:{port}"),
    timeout=300,
    heartbeat_timeout=100,
  )

  def pause():
    if process == 0:
      os.kill(os.getpid(), signal.SIGTERM)
    # The other waits here, too, or for this one.
    time.sleep(_NOTICE)

  def train(config, workdir, stop):
    recipe = test_loop.make_recipe()
    if when == "export":
      recipe = recipe._replace(export=lambda *_: pause())
    elif when == "step":
      # Results are looked at a step later: of the last but one, after the last
      # has begun.
      ledger = Ledger(pause, "small", config.num_steps - 1)
      recipe = recipe._replace(ledger=ledger)
    else:
      recipe = recipe._replace(ledger=Ledger(pause, "large", 2))
    toy = test_stages.toy_config(config)
    return loop.train(toy, workdir, recipe, stop=stop)

  stages.train(test_stages.make_config(), directory, train)


if __name__ == "__main__":
  main()
