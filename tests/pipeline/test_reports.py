"""Watching the sampler changes nothing, tells the truth, and can stop it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax.diffusion import samplers, schedules
from sana_jax.pipeline import denoising, execution, reports
from tests import tiny

# float32 sums in another order, through a few steps and the decoder.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(path)
  return path


def make_pipeline(tokenizer, **changes):
  config = tiny.transformer_config(num_layers=1, **changes)
  return functools.partial(
    tiny.make_pipeline,
    tokenizer,
    transformer=config,
    devices=jax.devices()[:2],
  )


@pytest.fixture(scope="module")
def pipe(tokenizer):
  return make_pipeline(tokenizer)()


@pytest.fixture(scope="module")
def inputs():
  """Three samples, so that one of two devices is filled up."""
  rng = np.random.default_rng(0)
  states = rng.normal(size=(3, tiny.LENGTH, 12)).astype(np.float32)
  mask = np.ones((3, tiny.LENGTH), bool)
  latents = rng.normal(size=(3, 4, 4, 4)).astype(np.float32)
  return latents, denoising.Condition(states, mask)


class Watcher:
  def __init__(self, stop_at=None):
    self.steps = []
    self.estimates = []
    self._stop_at = stop_at

  def __call__(self, step, num_steps, latents):
    if step == self._stop_at:
      raise LookupError("that is enough")
    self.steps.append((step, num_steps))
    self.estimates.append(latents.copy())


def denoise(pipe, inputs, **options):
  latents, condition = inputs
  return pipe.denoise(latents, pipe.make_schedule(), condition, **options)


def test_a_batch_cut_over_devices_is_reported_whole_and_in_order(pipe, inputs):
  watcher = Watcher()
  watched = denoise(pipe, inputs, on_step=watcher)
  assert watcher.steps == [(1, 3), (2, 3), (3, 3)]
  plain = denoise(pipe, inputs, trajectory=True)
  np.testing.assert_allclose(watched, plain.samples[-1], **TOLERANCE)
  np.testing.assert_allclose(
    np.stack(watcher.estimates), plain.denoised, **TOLERANCE
  )


def test_what_is_raised_stops_the_sampler_and_comes_out_of_the_call(
  pipe, inputs
):
  watcher = Watcher(stop_at=2)
  with pytest.raises(LookupError, match="enough"):
    denoise(pipe, inputs, on_step=watcher)
  assert watcher.steps == [(1, 3)]
  again = Watcher()
  denoise(pipe, inputs, on_step=again)  # nothing is left behind
  assert again.steps[-1] == (3, 3)


def test_watching_compiles_once_and_leaves_the_plain_program_alone(
  pipe, inputs
):
  denoise(pipe, inputs)
  denoise(pipe, inputs, on_step=Watcher())
  events: list[execution.Progress] = []
  denoise(pipe, inputs, progress=events.append)
  denoise(pipe, inputs, on_step=Watcher(), progress=events.append)
  assert len(events) == 4
  assert all(event.phase == "run" for event in events)


def test_sprint_reports_latents_in_the_scale_of_its_result(tokenizer, inputs):
  sprint = make_pipeline(tokenizer, guidance_embeds=True)(
    solver=schedules.SCM()
  )
  watcher = Watcher()
  noise = np.random.default_rng(1).normal(size=(2, 3, 4, 4, 4))
  result = denoise(
    sprint, inputs, noise=noise.astype(np.float32), on_step=watcher
  )
  assert [step for step, _ in watcher.steps] == [1, 2]
  # The last step goes all the way to its estimate.
  np.testing.assert_allclose(watcher.estimates[-1], result, **TOLERANCE)


def test_what_a_mask_keeps_is_in_every_estimate(pipe, inputs, rng):
  clean, noise = rng.normal(size=(2, 3, 4, 4, 4)).astype(np.float32)
  mask = np.zeros((3, 4, 4, 1), np.float32)
  mask[:, :, 2:] = 1
  watcher = Watcher()
  known = denoising.Known(clean, noise, mask)
  denoise(pipe, inputs, known=known, on_step=watcher)
  assert len(watcher.estimates) == 3
  for estimate in watcher.estimates:
    np.testing.assert_allclose(estimate[:, :, :2], clean[:, :, :2], **TOLERANCE)
    assert np.abs(estimate[:, :, 2:] - clean[:, :, 2:]).min() > 1e-6


def test_once_stopped_the_network_is_not_called_again():
  calls = []

  def velocity(x, sigma, timestep):
    jax.debug.callback(lambda: calls.append(None))
    return jnp.zeros_like(x)

  samplers.sample(
    velocity,
    jnp.ones((2, 3)),
    schedules.FlowEuler().schedule(10),
    report_fn=lambda index, denoised: index >= 3,
  )
  jax.effects_barrier()
  assert len(calls) == 4


def test_runs_at_the_same_time_do_not_mix(rng):
  told = {1: [], 2: []}
  with (
    reports.watch(lambda *a: told[1].append(a), 1, (1, 2, 2, 4)) as first,
    reports.watch(lambda *a: told[2].append(a), 1, (1, 2, 2, 4)) as second,
  ):
    for watching in (second, first):
      reports.report(
        watching.shared["run"],
        jnp.int32(0),
        jnp.asarray(watching.batched["rows"]),
        jnp.full((1, 2, 2, 4), float(watching is first)),
      )
    jax.effects_barrier()
  assert [a[2].max() for a in told[1]] == [1.0]
  assert [a[2].max() for a in told[2]] == [0.0]


@pytest.mark.usefixtures("nothing_compiled")
def test_compiled_programs_are_forgotten_after_many(monkeypatch):
  monkeypatch.setattr(execution, "_CAPACITY", 2)
  executor = execution.Executor(jax.devices()[:1])
  compiled = []

  def run(size):
    executor.run_on_first(
      "transformer",
      _shifted,
      arguments={"x": jnp.zeros((size, 3))},
      static={},
      progress=lambda event: compiled.append((size, event.phase)),
    )

  for size in (1, 2, 1, 3, 1, 2):
    run(size)
  built = [size for size, phase in compiled if phase == "compile"][::2]
  # 2 had to make room for 3, 1 had been used since.
  assert built == [1, 2, 3, 2]


def _shifted(*, x):
  return x + 1


def test_large_latents_on_more_devices_than_cores_do_not_hang(rng):
  # 512 kB a device, which JAX would copy in the pool that the devices fill.
  devices = jax.devices()
  latents = rng.normal(size=(len(devices), 64, 64, 32)).astype(np.float32)
  told = []

  def sample(*, run, rows, latents):
    return samplers.sample(
      lambda x, sigma, timestep: jnp.tanh(x),
      latents,
      schedules.FlowEuler().schedule(4),
      report_fn=lambda i, x: reports.report(run, i, rows, x),
    )

  with reports.watch(
    lambda step, num_steps, x: told.append(x), 4, latents.shape
  ) as watching:
    result = execution.Executor(devices).run(
      "transformer",
      sample,
      shared=watching.shared,
      batched=watching.batched | {"latents": latents},
      static={},
    )
  assert len(told) == 4
  np.testing.assert_allclose(told[-1], result, **TOLERANCE)
