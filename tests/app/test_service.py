"""A service: every request gets its images or a message, whatever happens."""

import json
import re
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest

from sana_jax import images as images_lib
from sana_jax import pipeline as pipeline_lib
from sana_jax.app import errors, making
from sana_jax.app import service as service_lib
from sana_jax.app.jobs import Update
from sana_jax.app.limits import Limits
from sana_jax.app.requests import GenerationRequest
from sana_jax.app.service import Service
from sana_jax.bulk import metadata
from sana_jax.weights import lora
from tests import tiny

# float32 sums in another order, and 8 bits.
TOLERANCE = {"rtol": 0, "atol": 2}
# Not to be waited for but by what hangs, also where compiling takes long.
SECONDS = 300


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(path)
  return tiny.make_pipeline(path)


@pytest.fixture(scope="module")
def adapters(pipe, tmp_path_factory):
  rng = np.random.default_rng(0)
  found = {}
  for name in ("style", "other"):
    pairs = {
      f"transformer_blocks.{i}.attn1.to_q": lora.Pair(
        rng.normal(size=(2, 16)).astype(np.float32),
        rng.normal(size=(16, 2)).astype(np.float32),
        8.0,
      )
      for i in range(2)
    }
    path = tmp_path_factory.mktemp(name)
    lora.save(path, lora.Lora(pairs))
    found[name] = path
  return found


@pytest.fixture(scope="module")
def service(pipe, adapters):
  service = Service(pipe, loras=adapters)
  yield service
  assert service.close()


@pytest.fixture
def gate(monkeypatch):
  """Makes a job wait in its first stage until it is let go."""
  gate = threading.Event()
  running = threading.Event()
  make = making.Maker.make

  def wait(self, request, post):
    if request.prompt != "gate":
      return make(self, request, post)
    running.set()
    while not gate.wait(0.005):
      post(Update("encode"))
    return making.Result([], [], request.seed, request.settings())

  monkeypatch.setattr(making.Maker, "make", wait)
  gate.running = running
  yield gate
  gate.set()


def ask(**fields) -> GenerationRequest:
  return GenerationRequest(**{"prompt": "a cat"} | fields)


def hold(service, gate):
  job = service.submit(ask(prompt="gate"), "someone")
  assert gate.running.wait(10)
  return job


def test_updates_lead_through_all_stages_to_images_that_say_how(service):
  job = service.submit(ask(prompt="a red apple", seed=7, num_images=2))
  updates = list(job.updates())
  result = job.result(0)
  stages = list(dict.fromkeys(update.stage for update in updates))
  order = ["queued", "encode", "denoise", "decode", "done"]
  assert stages[-1] == "done"
  assert [s for s in order if s in stages] == stages
  steps = [update.step for update in updates]
  assert steps == sorted(steps)
  assert (updates[-1].step, updates[-1].num_steps) == (3, 3)
  expected = service._maker._pipe(
    "a red apple", seed=7, num_images_per_prompt=2
  )
  assert len(result.images) == 2
  for i, image in enumerate(result.images):
    np.testing.assert_allclose(
      np.asarray(image, np.int16),
      images_lib.to_uint8(expected.images[i]),
      **TOLERANCE,
    )
    description = json.loads(image.info["sana_jax"])
    assert description["image_index"] == i
    assert description["seed"] == 7
    assert description["solver"] == "FlowDPMSolver"
    assert "lora" not in description


def test_each_result_has_the_warnings_of_its_own_request(service, caplog):
  asked = ask(guidance_scale=12.0, num_inference_steps=2)
  for _ in range(2):  # the same ones again
    job = service.submit(asked)
    (told,) = job.result(SECONDS).warnings
    assert told.startswith("Outside the trained range: guidance_scale 12.0")
    assert caplog.text.count(f"{job.id}: {told}") == 1
    caplog.clear()
  for _ in range(2):  # the second time, its text states are kept
    long = service.submit(ask(prompt="a cat " * 100, num_inference_steps=2))
    (told,) = long.result(SECONDS).warnings
    assert "dropped" in told
  assert service.submit(ask()).result(SECONDS).warnings == ()


def test_an_image_is_read_back_as_the_request_that_makes_it(service, tmp_path):
  first = service.submit(ask(num_images=2)).result(SECONDS)
  path = tmp_path / "second.png"
  path.write_bytes(first.pngs[1])
  description = metadata.read_png(path)
  again = metadata.request_again(service.pipe, str(path), description)
  assert (again.seed, again.image_index) == (first.seed, 1)
  alone = service.submit(
    GenerationRequest(
      **{**first.settings, "num_images": 1, "image_index": again.image_index}
    )
  ).result(SECONDS)
  np.testing.assert_allclose(
    np.asarray(alone.images[0], np.int16),
    np.asarray(first.images[1], np.int16),
    **TOLERANCE,
  )


def test_a_seed_left_open_is_another_one_each_time_and_is_said(service):
  first, second = (service.submit(ask()).result(SECONDS) for _ in range(2))
  assert first.seed != second.seed
  assert first.settings["seed"] == first.seed


def test_nothing_of_one_request_is_left_for_the_next(service):
  def pixels(**fields):
    result = service.submit(ask(seed=1, **fields)).result(SECONDS)
    return np.asarray(result.images[0], np.int16)

  plain = pixels()
  styled = pixels(lora="style")
  assert np.abs(styled - plain).max() > 5
  np.testing.assert_array_equal(pixels(lora="style", lora_scale=1.0), styled)
  np.testing.assert_array_equal(pixels(), plain)
  weak = pixels(lora="style", lora_scale=0.1)
  assert np.abs(weak - styled).max() > 2
  other = pixels(lora="other")
  assert np.abs(other - styled).max() > 2
  np.testing.assert_array_equal(pixels(lora="style"), styled)
  euler = pixels(solver="FlowEuler")
  assert np.abs(euler - plain).max() > 2
  assert service.check(ask()).solver == "FlowDPMSolver"
  np.testing.assert_array_equal(pixels(lora="style", lora_scale=0.0), plain)
  np.testing.assert_array_equal(pixels(), plain)


def test_an_adapter_compiles_nothing_and_is_named_in_the_image(
  service, adapters
):
  service.submit(ask(seed=1)).result(SECONDS)
  job = service.submit(ask(seed=1, lora="style", lora_scale=0.37))
  assert not any(update.compiling for update in job.updates())
  description = json.loads(job.result().images[0].info["sana_jax"])
  assert description["lora"] == ["style"]
  assert description["lora_scale"] == [0.37]
  assert str(adapters["style"]) not in json.dumps(description)


def test_clients_take_turns_and_positions_count_down(service, gate):
  held = hold(service, gate)
  jobs = [
    service.submit(ask(prompt="gate"), client) for client in ("a", "a", "b")
  ]
  positions = [next(job.updates()).position for job in jobs]
  assert positions == [1, 3, 2]
  jobs[0].cancel()
  assert [next(job.updates()).position for job in jobs[1:]] == [1, 2]
  gate.set()
  assert held.result(10).seed >= 0
  assert jobs[1].result(10).seed >= 0
  with pytest.raises(errors.CancelledError):
    jobs[0].result(10)


def test_a_full_queue_refuses_politely(pipe, gate):
  service = Service(pipe, Limits(max_waiting=3, max_waiting_per_client=2))
  hold(service, gate)
  for _ in range(2):
    service.submit(ask(), "a")
  with pytest.raises(errors.BusyError, match="of your requests") as caught:
    service.submit(ask(), "a")
  assert caught.value.retry_after >= 1
  service.submit(ask(), "b")
  with pytest.raises(errors.BusyError, match="3 requests are waiting"):
    service.submit(ask(), "c")
  gate.set()
  assert service.close(SECONDS)


def test_a_running_job_ends_at_its_next_step(service):
  service.submit(ask()).result(SECONDS)
  job = service.submit(ask(num_inference_steps=90))
  for update in job.updates():
    if update.step >= 2:  # a slow reader misses some
      job.cancel()
  assert update.stage == "cancelled"
  assert update.step < 90
  with pytest.raises(errors.CancelledError):
    job.result(0)
  assert service.submit(ask()).result(SECONDS).images


def test_the_log_says_how_each_job_began_and_ended(
  service, gate, monkeypatch, caplog
):
  caplog.set_level("INFO", "absl")
  made = service.submit(ask(num_images=2), "10.0.0.1", user="a\nb")
  list(made.updates())  # the last one comes after the log's line
  held = hold(service, gate)
  withdrawn = service.submit(ask())
  withdrawn.cancel()
  given_up = service.submit(ask())
  given_up.future.cancel()
  given_up.cancel()
  held.cancel()
  list(held.updates())

  def fail(*args):
    raise FloatingPointError("not\nfinite")

  monkeypatch.setattr(making.Maker, "make", fail)
  failed = service.submit(ask())
  list(failed.updates())

  def said(job):
    begin = f"{job.id}: "
    lines = [record.getMessage() for record in caplog.records]
    return [
      re.sub("[0-9.]+ s", "N s", t).removeprefix(begin)
      for t in lines
      if t.startswith(begin)
    ]

  asked = "1 image for this process, user None"
  assert said(made) == [
    "2 images for 10.0.0.1, user 'a\\nb'",
    "made 2 images, in N s",
  ]
  assert said(withdrawn) == [asked, "cancelled after N s"]
  assert said(given_up) == [asked, "cancelled after N s"]
  assert said(held)[1:] == ["cancelled after N s"]
  assert said(failed) == [asked, "an error", "failed after N s: not finite"]


@pytest.mark.parametrize(
  ("error", "kind", "told"),
  [
    (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9"), None, "fewer"),
    (jax.errors.JaxRuntimeError("INTERNAL: /secret"), None, "log says why"),
    (KeyError("/secret"), None, "log says why"),
    (FloatingPointError("not finite"), None, "not finite"),
    (ValueError("no fit"), errors.InvalidRequestError, "no fit"),
  ],
)
def test_an_error_is_its_jobs_alone(service, monkeypatch, error, kind, told):
  service.submit(ask()).result(SECONDS)

  def fail(*args, **kwargs):
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(pipeline_lib.SanaPipeline, "denoise", fail)
    job = service.submit(ask(seed=3, lora="style"))
    with pytest.raises(kind or errors.JobError, match=told) as caught:
      job.result(SECONDS)
  assert "secret" not in str(caught.value)
  assert list(job.updates())[-1].stage == "failed"
  assert service.submit(ask()).result(SECONDS).images


def test_closing_makes_what_waits_and_admits_nothing(pipe, gate):
  service = Service(pipe)
  held = hold(service, gate)
  waiting = service.submit(ask())
  version = waiting._version
  ended = []
  closer = threading.Thread(target=lambda: ended.append(service.close(SECONDS)))
  closer.start()
  while not service.closing:
    time.sleep(0.001)
  with pytest.raises(errors.ClosedError):
    service.submit(ask())
  assert waiting._version > version  # who follows it looks again
  gate.set()
  closer.join(SECONDS)
  assert ended == [True]
  assert held.result(0).seed >= 0
  assert waiting.result(0).images


def test_closing_at_once_tells_everyone(pipe, gate):
  service = Service(pipe)
  jobs = [hold(service, gate)] + [service.submit(ask()) for _ in range(5)]
  assert service.close()
  for job in jobs:
    with pytest.raises(errors.ClosedError, match="later"):
      job.result(0)
    assert list(job.updates())[-1].stage == "failed"


def test_who_waits_for_what_hangs_is_told_at_the_end(pipe, monkeypatch):
  monkeypatch.setattr(service_lib, "_STOP_SECONDS", 0.1)
  let_go, running = threading.Event(), threading.Event()

  def hang(self, request, post):  # like a compilation, it asks nobody
    running.set()
    let_go.wait(SECONDS)
    return making.Result([], [], 0, {})

  monkeypatch.setattr(making.Maker, "make", hang)
  service = Service(pipe)
  job = service.submit(ask())
  assert running.wait(SECONDS)
  assert not service.close()
  with pytest.raises(errors.ClosedError, match="later"):
    job.result(0)
  let_go.set()
  assert service.close()


def test_a_warm_up_gives_previews_and_saves_the_first_one_the_compiling(
  pipe, monkeypatch
):
  monkeypatch.setattr(pipe, "text_lengths", (6,))
  service = Service(pipe, warm_up=True)
  assert service.ready.wait(SECONDS)
  job = service.submit(ask())
  updates = list(job.updates())
  assert not any(update.compiling for update in updates)
  shown = [u.preview for u in updates if u.preview is not None]
  assert shown[-1].shape == (64, 64, 3)
  assert shown[-1].dtype == np.uint8
  assert np.any(shown[0] != shown[-1])
  longer = list(service.submit(ask(prompt="a " * 6)).updates())
  assert longer[-1].stage == "done"
  assert not any(update.compiling for update in longer)
  assert service.close()


def test_a_controlnet_is_warmed_up_too(tmp_path, monkeypatch):
  failed = []
  monkeypatch.setattr(service_lib.logging, "exception", failed.append)
  tiny.make_tokenizer(tmp_path)
  pipe = tiny.make_pipeline(
    tmp_path, controlnet=True, devices=jax.devices()[:1]
  )
  service = Service(pipe, warm_up=True)
  assert service.ready.wait(SECONDS)
  assert failed == []
  picture = PIL.Image.new("RGB", (32, 32), "red")
  updates = list(service.submit(ask(control_image=picture)).updates())
  assert not any(update.compiling for update in updates)
  assert any(update.preview is not None for update in updates)
  assert service.close()


def test_closing_breaks_a_warm_up_off(pipe, monkeypatch):
  monkeypatch.setattr(making.preview_lib, "enough", lambda latents: False)
  monkeypatch.setattr(making, "_WARM_UP_PROMPTS", ("a cat",) * 10**6)
  service = Service(pipe, warm_up=True)
  time.sleep(0.2)
  assert service.close()
  assert service.ready.is_set()


def test_an_adapter_that_does_not_fit_is_named_at_the_start(pipe, tmp_path):
  pair = lora.Pair(
    np.ones((2, 5), np.float32), np.ones((7, 2), np.float32), 1.0
  )
  lora.save(tmp_path, lora.Lora({"transformer_blocks.0.attn1.to_q": pair}))
  with pytest.raises(ValueError, match="does not fit the model"):
    Service(pipe, loras={"style": tmp_path})
