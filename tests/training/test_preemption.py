"""SIGTERM at awkward moments: the step is saved, and the run goes on later."""

import os
import signal
import threading

from jax.experimental import multihost_utils

from sana_jax.training import loop
from tests.training import test_loop


def ask_to_stop() -> None:
  os.kill(os.getpid(), signal.SIGTERM)


class Service:
  """Answers as JAX's preemption service does in one of several processes.

  That agrees on the number after the last that it was told, or after 0, and
  says so when it is told the same.

  Attributes:
    told: all numbers, in order.
  """

  def __init__(self, monkeypatch):
    self.told = []
    self._agreed = None
    monkeypatch.setattr(
      multihost_utils, "reached_preemption_sync_point", self._reached
    )

  def ask_to_stop(self) -> None:
    if self._agreed is None:
      self._agreed = (self.told or [0])[-1] + 1

  def _reached(self, number: int) -> bool:
    self.told.append(number)
    return number == self._agreed


def assert_goes_on_exactly(tmp_path, stopped_at):
  """Resumes the run in `tmp_path / "run"`, and compares."""
  whole = loop.train(
    test_loop.make_config(), tmp_path / "whole", test_loop.make_recipe()
  )
  names = (path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
  assert max(int(name) for name in names) == stopped_at
  again = loop.train(
    test_loop.make_config(), tmp_path / "run", test_loop.make_recipe()
  )
  test_loop.assert_states_equal(whole, again, rtol=0)


def test_asked_while_compiling_a_run_saves_its_first_step(tmp_path):
  recipe = test_loop.make_recipe()
  asked = []

  def loss_fn(*arguments):
    if not asked:  # While the step is traced; once.
      asked.append(True)
      ask_to_stop()
    return recipe.loss_fn(*arguments)

  state = loop.train(
    test_loop.make_config(),
    *(tmp_path / "run", recipe._replace(loss_fn=loss_fn)),
  )
  assert int(state.step) == 1
  assert_goes_on_exactly(tmp_path, 1)


def test_asked_while_sampling_a_run_breaks_off_and_saves(tmp_path):
  def sample(params, frozen):
    ask_to_stop()
    raise AssertionError("sampling went on")

  # Pictures are due at step 6, a checkpoint is not.
  recipe = test_loop.make_recipe()._replace(sample=sample)
  state = loop.train(test_loop.make_config(), tmp_path / "run", recipe)
  assert int(state.step) == 6
  assert not list((tmp_path / "run" / "samples").iterdir())
  assert_goes_on_exactly(tmp_path, 6)


def test_asked_while_it_waits_for_data_a_run_saves_and_ends(tmp_path):
  recipe = test_loop.make_recipe()
  never = threading.Event()

  def batches(host, first_step):
    for step, batch in enumerate(recipe.batches(host, first_step)):
      if step == 3:
        threading.Timer(1.0, ask_to_stop).start()
        never.wait(timeout=100)
      yield batch

  state = loop.train(
    test_loop.make_config(),
    *(tmp_path / "run", recipe._replace(batches=batches)),
  )
  never.set()
  assert int(state.step) == 3
  assert_goes_on_exactly(tmp_path, 3)


def test_asked_before_the_first_step_there_is_nothing_to_save(tmp_path):
  recipe = test_loop.make_recipe()

  def batches(host, first_step):
    ask_to_stop()
    yield from recipe.batches(host, first_step)

  state = loop.train(
    test_loop.make_config(), tmp_path, recipe._replace(batches=batches)
  )
  assert int(state.step) <= 1


def test_several_are_asked_before_the_first_step_of_a_run_that_goes_on(
  tmp_path, monkeypatch
):
  """While they restore or compile, which takes minutes."""
  recipe = test_loop.make_recipe()
  loop.train(test_loop.make_config(num_steps=5), tmp_path / "run", recipe)
  service = Service(monkeypatch)

  def loss_fn(*arguments):
    service.ask_to_stop()
    return recipe.loss_fn(*arguments)

  state = loop.train(
    test_loop.make_config(),
    *(tmp_path / "run", recipe._replace(loss_fn=loss_fn)),
  )
  assert int(state.step) == 6
  assert service.told == [1]
  Service(monkeypatch)  # Of other processes: nobody asks.
  assert_goes_on_exactly(tmp_path, 6)
