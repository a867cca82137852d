"""The training loop, the same for every recipe.

A recipe says what is trained; the loop says how: restore or initialise, step,
log, sample, save. The batch of a step is a pure function of (seed, step), so
the step number is all a resumed run needs to know about its input.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from etils import epath

from sana_jax import checkpoint, sharding
from sana_jax import config as config_lib
from sana_jax.training import (
  anomalies,
  budget,
  compilations,
  exporting,
  feeding,
  launch,
  metrics,
  out_of_memory,
  placement,
  preemption,
  preparation,
  profiling,
  run_record,
  speed,
  suspects,
  wandb_sink,
)
from sana_jax.training import recipe as recipe_lib
from sana_jax.training import scalars as scalars_lib
from sana_jax.training import step as step_lib

_KINDS = {
  "skipped": "loss, gradient or update is not finite, the step is skipped",
  "spike": "the loss is a spike",
}


class Options(NamedTuple):
  """What one start of a run is told, and is no part of its config.

  Attributes:
    argv: the command, for `run.json`.
    profile_steps: first and last step to be profiled.
    wandb_project: where the metrics go, too.
  """

  argv: Sequence[str] = ()
  profile_steps: tuple[int, int] | None = None
  wandb_project: str | None = None


def train(
  config: config_lib.TrainConfig,
  workdir: epath.PathLike,
  recipe: recipe_lib.Recipe,
  options: Options = Options(),  # noqa: B008 (immutable)
  stop: preemption.StopRequest | None = None,
) -> step_lib.TrainState:
  """Trains until `config.num_steps`, continuing what `workdir` holds.

  With several processes, an error ends this one at once, so that the others,
  which cannot go on without it, end soon.

  Args:
    stop: what may ask it to stop; None: SIGTERM, from here to its end.

  Raises:
    ValueError: `workdir` has checkpoints of another config, or other data.
    OSError: a checkpoint could not be written.
    MemoryError: the state, a step, the samples or the export do not fit the
      devices.
    FloatingPointError: too many steps were bad; see `anomalies.py`.
  """
  config.freeze()
  workdir = epath.Path(workdir)
  # What cannot be is said before the directory is this run's.
  plan = preparation.prepare(config, workdir, recipe)
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    if jax.process_index() == 0:
      stack.enter_context(run_record.logging_to(workdir / "run.log"))
    preparation.take(config, workdir, recipe, plan, options.profile_steps)
    stop = stop or stack.enter_context(preemption.stop_request())
    try:
      run = _Run(config, workdir, recipe, plan, options, stop, stack)
      run.make_steps()
      run.finish()
    except Exception as error:
      message = launch.explain_peer_failure(error)
      if message is None:
        raise
      logging.error("%s", message)
      launch.leave(1)
    return run.state


class _Pending(NamedTuple):
  """A step whose results were not looked at yet.

  Attributes:
    flops: None: the step is not to count for the speed.
  """

  step: int
  scalars: scalars_lib.Scalars
  flops: float | None


class _Run:
  """One process's run.

  The results of a step are looked at after the next one was dispatched, so
  that devices do not wait for Python.
  """

  def __init__(self, config, workdir, recipe, plan, options, stop, stack):
    self._config, self._workdir, self._recipe = config, workdir, recipe
    self._stop = stop
    self._mesh, self._program = plan.mesh, plan.program
    self._read_initial = plan.read_initial
    self._key_init, self._key = jax.random.split(jax.random.key(config.seed))
    # Making the recipe may have taken one process longer than another, and
    # Orbax begins with a collective.
    launch.meet("begin")
    self._checkpointer = checkpoint.Checkpointer(workdir, config.checkpoint)
    stack.callback(self._checkpointer.close)
    latest = self._checkpointer.latest_step()
    if latest is not None:
      self._checkpointer.check(latest, self._program.state)
    self._step = self._first_step = latest or 0
    self._pending: _Pending | None = None
    self._open_input(stack)
    self._trace()
    self.state = self._load(latest)
    self._open_outputs(options, stack)

  def _open_input(self, stack) -> None:
    config, recipe = self._config, self._recipe
    self._frozen = sharding.place(
      recipe.frozen,
      placement.frozen_shardings(recipe.frozen, recipe.param_axes, self._mesh),
    )
    self._feed = feeding.Feed(
      placement.global_batches(
        recipe.batches, config, self._mesh, first_step=self._step
      )
    )
    stack.callback(self._feed.close)
    self._steps = compilations.Steps(
      self._program.step, recipe.num_shapes, recipe.name_shape
    )

  def _trace(self) -> None:
    """Traces the first step: what its shapes do not allow is raised here.

    Nothing is compiled, and no state exists yet; both take minutes.
    """
    if self._step == self._config.num_steps:
      return
    batch = self._feed.peek(self._stop.is_set)
    if batch is not None:
      self._program.step.trace(
        self._program.state, self._frozen, self._key, batch
      )

  def _open_outputs(self, options: Options, stack) -> None:
    config, is_first = self._config, jax.process_index() == 0
    sink = None
    if is_first:
      run_record.add_start(
        *(self._workdir, self._mesh),
        first_step=self._step,
        argv=options.argv,
      )
    if is_first and options.wandb_project is not None:
      sink = wandb_sink.WandbSink(
        self._workdir, options.wandb_project, config.to_dict()
      )
    self._writer = metrics.MetricWriter(
      self._workdir, enabled=is_first, first_step=self._step, sink=sink
    )
    stack.callback(self._writer.close)
    notes = self._checkpointer.notes(self._step) if self._step else {}
    self._watch = anomalies.Watch(
      *(config.anomalies, self._workdir),
      first_step=self._step,
      writes=is_first,
      losses=notes.get("losses", ()),
    )
    self._best = metrics.WindowMean(
      config.checkpoint,
      first_step=self._step,
      notes=notes.get("best", {}),
    )
    self._profiler = profiling.Profiler(self._workdir, options.profile_steps)
    stack.enter_context(self._profiler.listening())
    self._chrono = speed.Chrono(
      *(self._step, config.num_steps, config.batch_size, self._mesh.size)
    )

  def make_steps(self) -> None:
    """Trains until the last step, or until this run is asked to stop."""
    self._count_data(self._step)
    while self._step < self._config.num_steps:
      # This looks at `stop` all the time while it waits.
      batch = self._feed.next(self._stop.is_set)
      if batch is not None:
        self._advance(batch)
        if self._watch.wants_rollback():
          self._roll_back()
      if batch is None or self._stop.reached():
        self._save(always=True)
        logging.warning(
          "asked to stop: %s",
          f"saved step {self._step}" if self._step else "no step is done yet",
        )
        return
      last = self._step == self._config.num_steps
      if last or self._step % self._config.checkpoint.every == 0:
        self._save(always=last)
      if last or self._step % self._config.sample_every == 0:
        self._sample()

  def finish(self) -> None:
    """Waits for the last checkpoint, and exports what is complete."""
    with self._chrono.paused():
      self._checkpointer.wait()
    export = self._recipe.export
    if export is None or self._step < self._config.num_steps:
      return
    explained = self._explained(
      out_of_memory.EXPORT,
      lambda: out_of_memory.of_samples(self._program.state, self._frozen),
    )
    with explained:
      exporting.export(
        *(export, (self.state.averaged, self._frozen), self._workdir),
        step=self._step,
        is_new=self._step > self._first_step,
      )

  def _advance(self, batch: Any) -> None:
    """Makes a step, and looks at the results of the one before."""
    is_new = self._steps.is_new(batch)
    # What is done already is not to wait for this step: on a CPU, calling a
    # step may be making it, and the clock would count both as one.
    if is_new or self._is_done():
      self._look()
    self._profiler.before(self._step + 1)
    explained = self._explained(
      out_of_memory.STEP,
      lambda: out_of_memory.of_step(self._program.state, self._frozen, batch),
    )
    # A step that compiles first does not count for the speed.
    paused = self._chrono.paused() if is_new else contextlib.nullcontext()
    trace = jax.profiler.StepTraceAnnotation("train", step_num=self._step + 1)
    others = (self._frozen, self._key, batch)
    with explained, paused, trace:
      if is_new:
        self._steps.compile(self._program.state, *others)
      self.state, scalars = self._steps(self.state, *others)
      if is_new:
        jax.block_until_ready(scalars)
    self._step += 1
    self._profiler.after(self._step, scalars)
    self._look()
    flops = None if is_new else self._flops(batch)
    self._pending = _Pending(self._step, scalars, flops)
    self._checkpointer.poll()

  def _explained(
    self, what: out_of_memory.What, parts: Callable[[], dict[str, int]]
  ):
    return out_of_memory.explained(what, parts, self._config, self._mesh)

  def _flops(self, batch: Any) -> float:
    per_image = self._recipe.flops_per_image
    if per_image is None:
      return 0.0
    return per_image(batch) * self._config.batch_size

  def _is_done(self) -> bool:
    return self._pending is not None and all(
      leaf.is_ready() for leaf in jax.tree.leaves(self._pending.scalars)
    )

  def _look(self) -> None:
    """Waits for the pending step and looks at its results."""
    if self._pending is None:
      return
    (step, scalars, flops), self._pending = self._pending, None
    unknown = self._best_names() - set(scalars)
    if unknown:
      raise ValueError(
        f"checkpoint.best_metric {unknown.pop()!r} is not measured; there are "
        f"{', '.join(sorted(scalars))}."
      )
    is_last = step == self._config.num_steps
    logged = is_last or step % self._config.log_every == 0
    names = scalars if logged else {"loss", "skipped", *self._best_names()}
    values = scalars_lib.to_floats(
      {name: scalars[name] for name in scalars if name in names}
    )
    if flops is not None:
      self._chrono.count(flops)
    skipped = values.pop("skipped") > 0
    kind = self._watch.judge(step, values["loss"], skipped=skipped)
    if kind is not None:
      self._note(step, kind, values["loss"])
    self._best.add(step, values)
    if logged:
      values["skipped"] = self._watch.skipped
      values |= self._chrono.tick(step, self._feed.waited)
      values |= speed.device_memory()
      self._writer.scalars(step, values)
      metrics.log_line(step, self._config.num_steps, values)
      self._count_data(step)

  def _count_data(self, step: int) -> None:
    if self._recipe.ledger is not None:
      self._recipe.ledger.note(step)

  def _best_names(self) -> set[str]:
    settings = self._config.checkpoint
    return {settings.best_metric} if settings.keep_best else set()

  def _note(self, step: int, kind: str, loss: float) -> None:
    """Says and writes down which batch a bad step was made of."""
    with self._chrono.paused():
      found = suspects.find(
        *(self._recipe.name_batch, self._recipe.batches),
        placement.reader_of_all(self._config),
        step - 1,
      )
    self._watch.note(
      *(step, kind),
      loss=str(loss),
      broken=found.broken,
      records=found.records,
    )
    logging.warning(
      "step %d: %s, loss %g; not finite in the batch: %s; batch of %s",
      *(step, _KINDS[kind], loss, ", ".join(found.broken) or "nothing"),
      suspects.shorten(found.records),
    )

  def _roll_back(self) -> None:
    """Returns to the last parameters before the bad steps; the data go on."""
    settings = self._config.anomalies
    if self._watch.is_exhausted():
      path = self._workdir / anomalies.REPORT
      if jax.process_index() == 0:
        anomalies.write_report(path, self._step, self._watch, self._config)
      raise FloatingPointError(
        f"step {self._step}: {settings.rollback_after} bad steps in a row "
        f"after {self._watch.rollbacks} rollbacks; the run stops. {path} names "
        f"the batches. The checkpoints are intact: lower optim.peak_lr or "
        f"optim.clip_norm, set dtype='float32', mend the data (and set "
        f"data.allow_changed=True), or raise anomalies.max_rollbacks; with "
        f"that, the same command goes on."
      )
    self._checkpointer.wait()
    target = anomalies.rollback_target(
      self._checkpointer.steps(),
      first_bad=self._watch.first_bad,
      every=self._config.checkpoint.every,
    )
    self._pending = None
    # Two states may not fit.
    jax.tree.map(lambda leaf: leaf.delete(), self.state)
    state = self._load(target)
    # As many updates as are undone count as skipped: schedules go by the rest.
    skipped = self._step - int(state.step) + int(state.skipped)
    counts = sharding.place(
      (np.int32(self._step), np.int32(skipped)),
      (sharding.replicated(self._mesh),) * 2,
    )
    self.state = state._replace(step=counts[0], skipped=counts[1])
    self._watch.note_rollback(self._step, target or 0)
    logging.warning(
      "%d bad steps in a row: the parameters of step %d go on at step %d "
      "(rollback %d of at most %d)",
      *(settings.rollback_after, target or 0, self._step),
      *(self._watch.rollbacks, settings.max_rollbacks),
    )

  def _save(self, *, always: bool) -> None:
    """Saves this step, unless it is one of several bad ones."""
    self._look()
    if self._step == 0 or (self._watch.first_bad is not None and not always):
      return
    settings = self._config.checkpoint
    values, notes = None, {"losses": self._watch.losses}
    if settings.keep_best:
      values = {settings.best_metric: self._best.of(self._step)}
      notes["best"] = self._best.notes
    with self._chrono.paused():
      self._checkpointer.save(self._step, self.state, values, notes)

  def _sample(self) -> None:
    """Writes pictures of the average and of the parameters themselves.

    Where there is no average, the parameters stand for it.
    """
    if self._recipe.sample is None:
      return
    self._look()
    shown = {"": self.state.averaged}
    if self.state.ema is not None:
      shown["_raw"] = self.state.params
    explained = self._explained(
      out_of_memory.SAMPLES,
      lambda: out_of_memory.of_samples(self._program.state, self._frozen),
    )
    with self._chrono.paused(), explained:
      for suffix, params in shown.items():
        if self._stop.is_set():
          return
        whole = sharding.gather((params, self._frozen))
        if whole is not None:
          with self._stop.breaking_off():
            picture = self._recipe.sample(*whole)
            self._writer.images(self._step, picture, suffix)
        # One copy at a time.
        del whole
        launch.meet("sampled")

  def _load(self, step: int | None) -> step_lib.TrainState:
    # Reading the first batch may have taken one process longer than another.
    launch.meet("load")
    explained = self._explained(
      out_of_memory.STATE,
      lambda: budget.state_budget(self._program.state),
    )
    with explained:
      # Placed without waiting: memory may run out a little later.
      return jax.block_until_ready(self._make_state(step))

  def _make_state(self, step: int | None) -> step_lib.TrainState:
    if step is not None:
      logging.info("resuming from step %d", step)
      return self._checkpointer.restore(step, self._program.state)
    logging.info("starting at step 0")
    if self._recipe.initial is None:
      function, given = self._program.init, self._key_init
    else:
      read = self._read_initial
      if read is None:
        read = self._recipe.initial(self._program.state.params)
      function, given = self._program.begin, read()
    return launch.compile_and_meet(function, given)(given)
