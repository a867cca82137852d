"""The page in Chromium, on a real server with the bundled model.

SANA_JAX_SCREENSHOTS names the directory that gets the pictures of the
documentation.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")

from safetensors import numpy as safetensors  # noqa: E402

from sana_jax import images as images_lib  # noqa: E402
from sana_jax import pipeline as pipeline_lib  # noqa: E402
from sana_jax.bulk import metadata  # noqa: E402
from tests.app import hostile  # noqa: E402

pytestmark = pytest.mark.ui

_CHROMIUM = os.environ.get("SANA_JAX_CHROMIUM", "/usr/bin/chromium")
_ROOT = pathlib.Path(__file__).parents[2]
# Each number of steps is compiled: one beside the checkpoint's 20 will do.
_STEPS = 30
_PROMPT = "woman firefighter: medium skin tone"
_PATIENCE = 180_000  # in milliseconds, for a machine that does much else
# Keeps what the status has said, since some of it is gone in a moment.
_WATCH = """() => {
  window.said = [];
  const note = () => {
    const line = document.querySelector("#status .message");
    const bar = document.querySelector("#status .bar");
    if (!line) return;
    const now = [line.innerText, bar && bar.getAttribute("aria-valuenow")];
    if (String(now) !== String(window.said.at(-1))) window.said.push(now);
  };
  new MutationObserver(note).observe(
    document.querySelector("#status"),
    {subtree: true, childList: true, characterData: true});
}"""
_UNNAMED = """() => [...document.querySelectorAll("input, textarea, button")]
  .filter(e => e.offsetParent && e.type !== "file")
  .filter(e => !(e.innerText || "").trim() && !e.ariaLabel && !e.title &&
    !e.getAttribute("aria-labelledby") && !(e.labels || []).length &&
    !e.querySelector("img[alt]"))
  .map(e => e.outerHTML.slice(0, 200))"""


def serve(*flags):
  """Starts a server; returns its process and address when it is ready."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  process = subprocess.Popen(
    [sys.executable, "-m", "sana_jax.app", f"--port={port}", *flags],
    cwd=_ROOT,
    env=environment | {"PYTHONPATH": str(_ROOT)},
  )
  address = f"http://127.0.0.1:{port}/"
  while True:
    assert process.poll() is None, "the server has ended"
    with (
      contextlib.suppress(OSError),
      urllib.request.urlopen(f"{address}health", timeout=60) as answer,
    ):
      if json.load(answer)["status"] == "ok":
        return process, address
    time.sleep(0.2)


def end(process):
  process.send_signal(signal.SIGTERM)
  try:
    process.wait(30)
  except subprocess.TimeoutExpired:
    process.kill()


@pytest.fixture(scope="module")
def address():
  process, address = serve()
  yield address
  end(process)


@pytest.fixture(scope="module")
def browser():
  with sync_api.sync_playwright() as playwright:
    browser = playwright.chromium.launch(
      executable_path=_CHROMIUM, args=["--no-sandbox"]
    )
    yield browser
    browser.close()


@pytest.fixture
def visit(browser, address):
  """Opens the page for one more visitor; at the end, looks at what was asked.

  A visitor's browser asks no other host, and never sees a stack trace.
  """
  tabs = []

  def open_page(where=address, **options):
    tab = browser.new_context(**options).new_page()
    tab.set_default_timeout(_PATIENCE)
    asked = []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(where)
    tab.locator("#prompt textarea").wait_for()
    tab.evaluate(_WATCH)
    tabs.append((tab, where, asked))
    return tab

  yield open_page
  for tab, where, asked in tabs:
    if not tab.is_closed():
      assert "Traceback" not in tab.content()
    tab.context.close()
    assert asked
    kept = ("data:", "blob:", where)
    assert [url for url in asked if not url.startswith(kept)] == []


@pytest.fixture
def screenshots(tmp_path):
  return pathlib.Path(os.environ.get("SANA_JAX_SCREENSHOTS", tmp_path))


def fill(tab, **values):
  """Fills fields in, by name."""
  for name, value in values.items():
    field = tab.locator(
      f"#{name} :is(textarea, input[type=number], input[type=checkbox])"
    ).first
    if isinstance(value, bool):
      field.set_checked(value)
    else:
      field.fill(str(value))


def field_values(tab, *names):
  return [
    tab.locator(
      f"#{name} :is(textarea, input[type=number])"
    ).first.input_value()
    for name in names
  ]


def choose(tab, name, text):
  """Takes a choice of a drop-down field."""
  tab.locator(f"#{name} input").click()
  tab.get_by_role("option", name=text).click()


def press(tab, name):
  tab.get_by_role("button", name=name, exact=True).click()


def generate(tab):
  """Presses the button, and waits for images; returns what the status said."""
  before = tab.evaluate("window.said.length")
  press(tab, "Generate")
  tab.wait_for_function(
    "before => window.said.slice(before).some(s => /of seed/.test(s[0]))",
    arg=before,
  )
  wait(tab)
  return tab.evaluate("window.said")[before:]


def wait(tab):
  tab.get_by_role("button", name="Generate", disabled=False).wait_for()


def download(tab):
  """Returns the file of the image that is shown: pixels and description."""
  with tab.expect_download() as waiting:
    tab.get_by_text("Download PNG").click()
  data = pathlib.Path(waiting.value.path()).read_bytes()
  assert waiting.value.suggested_filename.endswith(".png")
  image = PIL.Image.open(io.BytesIO(data))
  image.load()
  assert image.format == "PNG"
  return np.asarray(image), metadata.read_chunks(image.info, "download")


def test_an_image_appears_while_progress_is_shown(visit, screenshots):
  tab = visit(viewport={"width": 1200, "height": 900})
  assert tab.evaluate(_UNNAMED) == []  # for screen readers
  fill(tab, prompt="flag: France")
  generate(tab)
  fill(tab, prompt=_PROMPT, num_inference_steps=_STEPS, num_images=2)
  steps = [
    (int(found[1]), int(bar))
    for line, bar in generate(tab)
    if (found := re.match(rf"Step (\d+) of {_STEPS}", line))
  ]
  assert len(set(steps)) >= 2
  assert steps == sorted(steps)
  assert all(line == bar for line, bar in steps)
  shown = tab.locator("#picture img")
  assert shown.evaluate("image => image.naturalWidth") == 64
  assert tab.locator("#gallery button img").count() == 3
  pixels, description = download(tab)
  assert pixels.shape == (64, 64, 3)
  assert pixels.std() > 20
  assert description["prompt"] == _PROMPT
  assert description["num_inference_steps"] == _STEPS
  details = tab.locator("#details").inner_text()
  assert _PROMPT in details
  assert str(description["seed"]) in details
  tab.screenshot(path=screenshots / "page.png", full_page=True)


def test_an_image_can_be_made_again(visit):
  tab = visit()
  fill(tab, prompt="flag: France", negative_prompt="red", num_images=2)
  fill(tab, num_inference_steps=_STEPS, guidance_scale=3.5)
  choose(tab, "aspect", "1:1")
  tab.get_by_text("Flow-Euler").click()
  generate(tab)
  tab.locator("#gallery button").nth(1).click()
  tab.locator("#details").get_by_text("1", exact=True).wait_for()
  pixels, description = download(tab)
  fill(tab, prompt="something else", negative_prompt="", guidance_scale=9)
  fill(tab, num_inference_steps=3, seed=1, image_index=0)
  choose(tab, "aspect", "Automatic")
  tab.get_by_text("Flow-DPM-Solver++").first.click()
  press(tab, "Reproduce")
  tab.get_by_text("The form has the settings").wait_for()
  names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale")
  assert field_values(tab, *names) == [
    "flag: France",
    "red",
    str(_STEPS),
    "3.5",
  ]
  assert field_values(tab, "seed", "image_index", "num_images") == [
    str(description["seed"]),
    "1",
    "1",
  ]
  assert tab.locator("#aspect input").input_value().startswith("1:1")
  assert tab.get_by_label("Flow-Euler").is_checked()
  assert not tab.get_by_label("New seed every time").is_checked()
  generate(tab)
  # The newest is framed, and not the one that was chosen before.
  tab.locator("#gallery button").first.and_(
    tab.locator("#gallery .selected")
  ).wait_for()
  assert tab.locator("#gallery .selected").count() == 1
  again, described = download(tab)
  assert description["image_index"] == described["image_index"] == 1
  same = description | {"batch_size": 1}
  assert described == same
  # The batch had two images; what that changes is less than a level.
  assert np.abs(pixels.astype(int) - again).max() <= 1
  generate(tab)  # the same form again
  assert (download(tab)[0] == again).all()


def test_settings_are_read_from_a_file(visit, tmp_path):
  tab = visit()
  fill(tab, prompt="red heart", num_inference_steps=_STEPS)
  generate(tab)
  with tab.expect_download() as waiting:
    tab.get_by_text("Download PNG").click()
  good = tmp_path / "good.png"
  waiting.value.save_as(good)
  seed = metadata.read_png(good)["seed"]
  other = visit()
  other.get_by_text("Settings from an image").click()
  give = other.locator("#from_image input[type=file]")
  give.set_input_files(good)
  status = other.locator("#from_image_status")
  status.get_by_text("The form has the settings").wait_for()
  assert field_values(other, "prompt", "num_inference_steps", "seed") == [
    "red heart",
    str(_STEPS),
    str(seed),
  ]


def _png(chunks):
  return images_lib.encode_png(np.zeros((8, 8, 3)), chunks)


def _described(text):
  return _png({"sana_jax": text})


def test_hostile_files_get_a_message(visit, tmp_path):
  tab = visit()
  tab.get_by_text("Settings from an image").click()
  alert = tab.locator("#from_image_status [role=alert]")
  impossible = '{"prompt": 3, "seed": -1, "image_index": 0, "batch_size": 1}'
  for number, (data, message) in enumerate(
    (
      (b"import os", "is not a readable picture"),
      (_described("[" * 100_000), "does not say how it was made"),
      (hostile.bomb(), "pixels"),
      (_described(impossible), "cannot be used"),
      (_described("{}"), "does not say its"),
      (_png({}), "does not say how it was made"),
    )
  ):
    file = tmp_path / f"{number}.png"
    file.write_bytes(data)
    tab.locator("#from_image input[type=file]").set_input_files(file)
    alert.get_by_text(message).wait_for()
    tab.locator("#from_image").get_by_label("Clear").click()


def test_what_is_wrong_is_said_beside_the_field(visit):
  tab = visit()
  fill(tab, prompt="red heart")
  choose(tab, "aspect", "Width and height")
  tab.locator("#width").wait_for()
  fill(tab, width=100_000, height=64)
  press(tab, "Generate")
  alert = tab.locator("#status [role=alert]")
  alert.get_by_text("must be from 1 to").wait_for()
  wait(tab)
  refused = tab.locator("#width.refused")
  assert "must be from 1 to" in refused.inner_text()
  fill(tab, prompt="")
  press(tab, "Generate")
  tab.locator("#prompt.refused").wait_for()
  assert "The prompt is empty" in alert.inner_text()
  assert tab.locator(".refused").count() == 1
  assert tab.locator("#gallery").is_hidden()
  fill(tab, prompt="red heart", width=64)
  generate(tab)
  assert tab.locator(".refused").count() == 0


def test_a_picture_that_is_refused_leaves_the_page_usable(visit, tmp_path):
  PIL.Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
  tab = visit()
  tab.get_by_text("Begin with an image").click()
  give = tab.locator("#mask_image input[type=file]")
  give.set_input_files(tmp_path / "mask.png")
  tab.locator("#mask_image img").wait_for()
  fill(tab, prompt="red heart")
  press(tab, "Generate")
  alert = tab.locator("#status [role=alert]")
  alert.get_by_text("There is a mask, but no image").wait_for()
  wait(tab)
  tab.locator("#image.refused").wait_for()
  clear = re.compile("clear|remove", re.IGNORECASE)
  tab.locator("#mask_image").get_by_role("button", name=clear).first.click()
  tab.locator("#mask_image img").wait_for(state="detached")
  generate(tab)
  assert tab.locator(".refused").count() == 0


def test_two_visitors_get_their_own_images(visit):
  prompts = ("red heart", "flag: France")
  tabs = [visit() for _ in prompts]
  for tab, prompt in zip(tabs, prompts, strict=True):
    fill(tab, prompt=prompt, num_inference_steps=_STEPS, randomize=False)
    fill(tab, seed=3)
  for tab in tabs:
    press(tab, "Generate")
  for tab in tabs:
    tab.locator("#status").get_by_text("of seed 3").wait_for()
  results = [download(tab) for tab in tabs]
  assert [description["prompt"] for _, description in results] == [*prompts]
  assert np.abs(results[0][0].astype(int) - results[1][0]).mean() > 20
  for tab in tabs:
    assert tab.locator("#gallery button img").count() == 1
    lines = [line for line, _ in tab.evaluate("window.said")]
    assert any(line.startswith("Step") for line in lines)


def test_what_is_painted_over_is_made_anew(visit, tmp_path, rng):
  known = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
  PIL.Image.fromarray(known).save(tmp_path / "known.png")
  tab = visit(viewport={"width": 1200, "height": 1400})
  fill(tab, prompt="red heart")
  tab.get_by_text("Begin with an image").click()
  with tab.expect_file_chooser() as chooser:
    tab.locator("#image").get_by_role("button", name="Upload").click()
  chooser.value.set_files(tmp_path / "known.png")
  tab.locator("#image").get_by_role("button", name="Brush Size").wait_for()
  fill(tab, strength=1)
  canvas = tab.locator("#image canvas").first
  canvas.scroll_into_view_if_needed()
  box = canvas.bounding_box()
  x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
  tab.mouse.move(x - 15, y)
  tab.mouse.down()
  tab.mouse.move(x + 15, y + 15, steps=10)
  tab.mouse.up()
  generate(tab)
  pixels, description = download(tab)
  assert description["mask_image"] == "uploaded"
  changed = (pixels != known).any(axis=-1)
  assert 0.02 < changed.mean() < 0.9
  # The painter's own pixels outside of what was painted.
  assert not changed[:4].any()
  assert not changed[-4:].any()


def test_who_cancels_or_leaves_makes_room(visit):
  first, leaving, last = (visit() for _ in range(3))
  # The only ones of this number: compiling gives the others time.
  fill(first, prompt="red heart", num_inference_steps=100, num_images=3)
  press(first, "Generate")
  first.get_by_role("progressbar").or_(first.get_by_text("takes a while")).or_(
    first.get_by_text("Starting")
  ).first.wait_for()
  for tab in (leaving, last):
    fill(tab, prompt="red heart")
    press(tab, "Generate")
    tab.locator("#status").get_by_text("before you").wait_for()
  last.locator("#status").get_by_text("2 before you").wait_for()
  leaving.close()
  last.locator("#status").get_by_text("1 before you").wait_for()
  press(first, "Cancel")
  first.locator("#status").get_by_text("was cancelled").wait_for()
  wait(first)
  assert first.locator("#gallery").is_hidden()
  last.locator("#status").get_by_text("of seed").wait_for()


def test_the_page_fits_a_phone(visit, screenshots):
  tab = visit(
    viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True
  )
  fill(tab, prompt="woman: red hair", num_images=2, num_inference_steps=_STEPS)
  generate(tab)
  width = tab.evaluate("document.scrollingElement.scrollWidth")
  assert width == 390
  tab.screenshot(path=screenshots / "page_phone.png")


def test_a_failure_is_a_message(visit, tmp_path):
  broken = tmp_path / "broken"
  shutil.copytree(str(pipeline_lib.bundled_checkpoint()), broken)
  file = broken / "transformer" / "diffusion_pytorch_model.safetensors"
  weights = safetensors.load_file(file)
  safetensors.save_file(
    {name: np.full_like(array, np.nan) for name, array in weights.items()}, file
  )
  process, address = serve(f"--checkpoint={broken}", "--nowarm_up")
  try:
    tab = visit(address)
    fill(tab, prompt="red heart")
    press(tab, "Generate")
    tab.locator("#status [role=alert]").get_by_text("not finite").wait_for()
    wait(tab)
  finally:
    end(process)


def test_the_server_as_it_is_started_answers_to_its_own_names_alone(address):
  def status(name):
    request = urllib.request.Request(address, headers={"Host": name})
    with urllib.request.urlopen(request, timeout=60) as answer:
      return answer.status

  assert status("localhost:7860") == 200
  with pytest.raises(urllib.error.HTTPError, match="421"):
    status("evil.example")


def test_visitors_whose_images_are_not_made_any_more_are_told(visit, capfd):
  process, address = serve("--nowarm_up", "--grace_seconds=1")
  try:
    tabs = [visit(address) for _ in range(2)]
    for tab in tabs:
      fill(tab, prompt=_PROMPT, num_inference_steps=100, num_images=4)
      press(tab, "Generate")
      tab.get_by_role("button", name="Cancel").wait_for()
    tabs[1].locator("#status").get_by_text("1 before you").wait_for()
    process.send_signal(signal.SIGTERM)
    for tab in tabs:
      ended = tab.locator("#status [role=alert]")
      ended.get_by_text("shutting down; send the request again").wait_for()
    said = [text for text, _ in tabs[1].evaluate("window.said")]
    assert any("It may not come to your images." in text for text in said)
    assert process.wait(60) == 0
  finally:
    end(process)
  assert "Traceback" not in capfd.readouterr().err
