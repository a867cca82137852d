"""Bad steps: skipped, named, answered by going back, and at last by an end."""

import dataclasses
import itertools
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.nn import layers
from sana_jax.training import anomalies, loop, suspects
from tests.training import test_loop

LIMITS = config_lib.AnomalyConfig(
  rollback_after=3, max_rollbacks=2, spike_factor=10.0, spike_window=10
)


def make_watch(path, first_step=0, limits=LIMITS):
  return anomalies.Watch(limits, path, first_step=first_step, writes=True)


def make_recipe(bad=(), row=5):
  """The recipe of the loop's tests, on batches some of which have a NaN."""

  def batches(host, first_step):
    for step in itertools.count(first_step):
      x = np.random.default_rng(step).normal(size=(8, 8)).astype(np.float32)
      if step in bad:
        x[row, 3] = np.nan
      yield {"x": x}

  return test_loop.make_recipe()._replace(
    init=lambda key: {"line": layers.Linear(8, 8, rngs=nnx.Rngs(key))},
    batches=batches,
    name_batch=lambda step: [f"source: {step}.{i}" for i in range(8)],
  )


def make_config(**changes):
  return test_loop.make_config(anomalies=LIMITS, log_every=1, **changes)


def rows_of(path):
  return [
    json.loads(row)
    for row in (path / "anomalies.jsonl").read_text().splitlines()
  ]


def test_a_bad_batch_is_named_and_changes_nothing(tmp_path, caplog):
  """Step 6 has the data of step 5, counted from 0."""
  state = loop.train(make_config(), tmp_path, make_recipe(bad=[5]))
  assert int(state.step) == 12
  assert int(state.skipped) == 1
  (row,) = rows_of(tmp_path)
  assert (row["step"], row["kind"]) == (6, "skipped")
  assert row["broken"] == ["source: 5.5"]
  assert row["records"] == [f"source: 5.{i}" for i in range(8)]
  (message,) = [
    r.getMessage() for r in caplog.records if "skipped" in r.msg % r.args
  ]
  assert "step 6: loss, gradient or update is not finite" in message
  assert "not finite in the batch: source: 5.5; batch of source: 5.0" in message
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_lone_bad_batch_is_as_if_the_step_had_not_been(tmp_path):
  recipe = make_recipe(bad=[3])
  before = loop.train(make_config(num_steps=3), tmp_path, recipe)
  before = jax.device_get(before)
  after = loop.train(make_config(num_steps=4), tmp_path, recipe)
  for name in ("params", "ema"):
    test_loop.assert_states_equal(
      getattr(before, name), getattr(after, name), rtol=0
    )


def test_bad_steps_in_a_row_bring_back_the_parameters_before_them(
  tmp_path, caplog
):
  """Checkpoint 4 is the last before steps 6 to 8; the data go on."""
  recipe = make_recipe(bad=[5, 6, 7])
  config = make_config(num_steps=9)
  saved = jax.device_get(
    loop.train(make_config(num_steps=4), tmp_path / "four", recipe)
  )
  state = loop.train(config, tmp_path / "run", recipe)
  kinds = [(row["step"], row["kind"]) for row in rows_of(tmp_path / "run")]
  # Results are looked at while the next step runs, so that one is lost, too.
  assert kinds == [
    *((6, "skipped"), (7, "skipped"), (8, "skipped"), (9, "rollback"))
  ]
  assert rows_of(tmp_path / "run")[-1]["to"] == 4
  # Schedules go by the four updates that are left.
  assert (int(state.step), int(state.skipped)) == (9, 5)
  test_loop.assert_states_equal(saved.params, state.params, rtol=0)
  test_loop.assert_states_equal(saved.opt_state, state.opt_state, rtol=0)
  assert (
    "the parameters of step 4 go on at step 9 (rollback 1 of" in caplog.text
  )


@pytest.mark.parametrize("first", [5, 7, 8, 9, 10])
def test_a_run_with_a_rollback_is_resumed_exactly(tmp_path, first):
  """Stopped before, amid, and after the bad steps."""
  recipe = make_recipe(bad=[5, 6, 7, 9])
  whole = loop.train(make_config(), tmp_path / "whole", recipe)
  loop.train(make_config(num_steps=first), tmp_path / "parts", recipe)
  parts = loop.train(make_config(), tmp_path / "parts", recipe)
  test_loop.assert_states_equal(whole, parts, rtol=0)
  assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "parts")


def test_a_resumed_run_finds_the_same_spikes(tmp_path):
  """The median is of steps before the checkpoint; step 23 is far above."""

  def batches(host, first_step):
    for step in itertools.count(first_step):
      scale = 1e3 if step == 22 else 1.0
      x = scale * np.random.default_rng(step).normal(size=(8, 8))
      yield {"x": x.astype(np.float32)}

  recipe = make_recipe()._replace(batches=batches)
  changes = {"checkpoint": config_lib.CheckpointConfig(every=50)}
  loop.train(make_config(num_steps=24, **changes), tmp_path / "whole", recipe)
  for step in (21, 24):
    config = make_config(num_steps=step, **changes)
    loop.train(config, tmp_path / "parts", recipe)
  (row,) = rows_of(tmp_path / "whole")
  assert (row["step"], row["kind"]) == (23, "spike")
  assert rows_of(tmp_path / "parts") == [row]


def test_a_failure_that_persists_ends_the_run_with_a_report(tmp_path):
  recipe = make_recipe(bad=range(5, 100))
  config = make_config(num_steps=40)
  with pytest.raises(
    FloatingPointError, match=r"3 bad steps in a row after 2 rollbacks.*peak_lr"
  ):
    loop.train(config, tmp_path, recipe)
  report = json.loads((tmp_path / "report.json").read_text())
  assert report["rollbacks"] == 2
  assert report["limits"]["rollback_after"] == 3
  assert report["anomalies"] == rows_of(tmp_path)
  assert report["anomalies"][0]["broken"] == ["source: 5.5"]
  # What is kept is from before, and with other data the run goes on.
  state = loop.train(config, tmp_path, make_recipe())
  assert int(state.step) == 40
  assert int(state.skipped) == 0


def test_a_run_that_gave_up_goes_on_as_its_message_says(tmp_path, caplog):
  """Other values are taken of what it names (tests of data: test_ledger)."""
  with pytest.raises(FloatingPointError) as info:
    loop.train(
      make_config(num_steps=40), tmp_path, make_recipe(bad=range(5, 100))
    )
  fields = r"(?:optim|data|anomalies)\.[a-z_]+|dtype"
  named = set(re.findall(fields, str(info.value).split("intact")[1]))
  config = make_config(num_steps=40)
  config.optim.peak_lr /= 2
  config.optim.clip_norm /= 4
  config.dtype = "float32"
  config.anomalies = dataclasses.replace(LIMITS, max_rollbacks=3)
  assert named == {
    *("optim.peak_lr", "optim.clip_norm", "dtype", "data.allow_changed"),
    "anomalies.max_rollbacks",
  }
  state = loop.train(config, tmp_path, make_recipe())
  assert (int(state.step), int(state.skipped)) == (40, 0)
  for change in (
    "optim.peak_lr was 0.05, now 0.025: the run learns",
    "optim.clip_norm was 0.1, now 0.025: the run learns",
    "dtype was bfloat16, now float32: the run learns",
  ):
    assert change in caplog.text
  with pytest.raises(ValueError, match=r"differing: seed \(0 there, 1 here\)"):
    loop.train(dataclasses.replace(config, seed=1), tmp_path, make_recipe())


def test_without_a_checkpoint_a_rollback_returns_to_the_start(tmp_path):
  recipe = make_recipe(bad=[1, 2, 3])
  state = loop.train(make_config(num_steps=5), tmp_path, recipe)
  assert rows_of(tmp_path)[-1] == {"step": 5, "kind": "rollback", "to": 0}
  fresh = loop.train(make_config(num_steps=1), tmp_path / "b", make_recipe([0]))
  test_loop.assert_states_equal(fresh.params, state.params, rtol=0)


@pytest.mark.parametrize(
  ("steps", "target"),
  [((4, 8, 10, 12), 8), ((10, 14), 10), ((14, 15), 14), ((), None)],
)
def test_a_rollback_prefers_what_every_run_has_saved(steps, target):
  found = anomalies.rollback_target(steps, first_bad=12, every=4)
  assert found == target


def test_a_loss_far_above_the_last_ones_is_a_spike_and_no_more(tmp_path):
  watch = make_watch(tmp_path)
  for step in range(1, 11):
    assert watch.judge(step, 1.0 + 0.1 * step, skipped=False) is None
  # The median is 1.55.
  assert watch.judge(11, 15.4, skipped=False) is None
  assert watch.judge(12, 16.6, skipped=False) == "spike"
  for step in (13, 14, 15):
    assert watch.judge(step, 1000.0, skipped=False) == "spike"
    watch.note(step, "spike")
  assert not watch.wants_rollback()
  assert (watch.first_bad, watch.skipped) == (None, 0)
  assert not make_watch(tmp_path, first_step=15).wants_rollback()


def test_a_level_that_lasts_is_no_spike_for_long(tmp_path):
  """Of ten losses, the sixth high one makes a high median."""
  watch = make_watch(tmp_path)
  levels = [1.0] * 30 + [20.0] * 100
  found = [watch.judge(i, loss, skipped=False) for i, loss in enumerate(levels)]
  spikes = [step for step, kind in enumerate(found) if kind == "spike"]
  assert spikes == [30, 31, 32, 33, 34]


def test_a_spike_between_skipped_steps_ends_their_row(tmp_path):
  watch = make_watch(tmp_path)
  for _ in range(10):
    watch.judge(1, 1.0, skipped=False)
  for step, loss in ((2, np.nan), (3, np.nan), (4, 99.0), (5, np.nan)):
    kind = watch.judge(step, loss, skipped=not np.isfinite(loss))
    assert kind == ("skipped" if np.isnan(loss) else "spike")
    watch.note(step, kind)
  for same in (watch, make_watch(tmp_path, first_step=5)):
    assert (same.first_bad, same.skipped) == (5, 3)
    assert not same.wants_rollback()


def test_without_a_factor_there_are_no_spikes(tmp_path):
  limits = config_lib.AnomalyConfig(spike_factor=0.0)
  watch = make_watch(tmp_path, limits=limits)
  losses = [1.0] * 150 + [1e9]
  assert {watch.judge(i, x, skipped=False) for i, x in enumerate(losses)} == {
    None
  }


def test_what_was_noted_is_known_again_up_to_the_step_that_is_resumed(tmp_path):
  watch = make_watch(tmp_path)
  for step in (2, 3, 4):
    watch.note(step, "skipped")
  watch.note_rollback(5, 1)
  for step in (7, 8):
    watch.note(step, "skipped")
  again = make_watch(tmp_path, first_step=8)
  assert (again.skipped, again.rollbacks, again.first_bad) == (5, 1, 7)
  later = make_watch(tmp_path, first_step=9)
  assert later.first_bad is None
  earlier = make_watch(tmp_path, first_step=3)
  assert (earlier.skipped, earlier.rollbacks) == (2, 0)
  assert earlier.first_bad == 2
  with (tmp_path / "anomalies.jsonl").open("a") as file:
    file.write('{"step": 4, "ki')  # A killed process.
  assert [row["step"] for row in make_watch(tmp_path, 9).rows] == [2, 3]


def test_records_are_listed_briefly():
  names = [f"r{i}" for i in range(11)]
  assert suspects.shorten(names[:2]) == "r0, r1"
  assert suspects.shorten(names).endswith("r7 and 3 more")
  assert suspects.shorten([]) == "records without names"
