"""Parts of the page that need no browser."""

import asyncio
import html
import json
import os
import pathlib
import types

import numpy as np
import PIL.Image
import pytest

gradio = pytest.importorskip("gradio")

from sana_jax import images as images_lib  # noqa: E402
from sana_jax.app import (  # noqa: E402
  adapters,
  limits,
  making,
  page,
  requests,
  service,
)
from sana_jax.app.errors import (  # noqa: E402
  CancelledError,
  InvalidRequestError,
)
from sana_jax.app.jobs import Job, Result, Update  # noqa: E402
from sana_jax.app.page import (  # noqa: E402
  form,
  form_from_image,
  form_values,
  guard,
  handlers,
  markup,
  own_files,
)
from sana_jax.bulk import metadata  # noqa: E402
from sana_jax.diffusion import schedules  # noqa: E402
from tests import tiny  # noqa: E402
from tests.app import hostile  # noqa: E402

pytestmark = pytest.mark.ui


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
  directory = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(directory)
  return directory


@pytest.fixture
def files(monkeypatch):
  files = own_files.PageFiles(max_bytes=2500)
  monkeypatch.setenv("GRADIO_TEMP_DIR", str(files.path))
  yield files
  asyncio.run(_leave(files))
  assert not files.path.exists()


async def _leave(files):
  async with files.kept_small():
    pass


@pytest.fixture
def build(tokenizer_directory, files):
  """Builds the page of a tiny pipeline."""
  services = []

  def build(**options):
    pipe = tiny.make_pipeline(tokenizer_directory, **options)
    services.append(service.Service(pipe))
    return page.build(services[-1], files)

  yield build
  for made in services:
    assert made.close()


@pytest.fixture
def components(build):
  """Builds a page; returns its components by id."""

  def components(**options):
    blocks = build(**options)
    assert not blocks.analytics_enabled
    config = blocks.get_config_file()
    shown = {d["api_visibility"] for d in config["dependencies"]}
    assert shown == {"private"}
    return {
      c["props"]["elem_id"]: c["props"]
      for c in config["components"]
      if c["props"].get("elem_id")
    }

  return components


def _event(blocks, name):
  """Returns an event of a page."""
  (found,) = (fn for fn in blocks.fns.values() if fn.name == name)
  return found


def _send(blocks, event, updates):
  """Has Gradio do with an event's updates what it would; by id."""
  sent = asyncio.run(blocks.postprocess_data(event, updates, None))
  ids = [output.elem_id for output in event.outputs]
  return dict(zip(ids, sent, strict=True))


def test_without_a_chosen_image_there_is_nothing_to_reproduce(build):
  blocks = build()
  reproduce = _event(blocks, "reproduce")
  for images, selected in (([], None), ([], 3)):
    sent = _send(blocks, reproduce, reproduce.fn(images, selected))
    assert not any("value" in (update or {}) for update in sent.values())


def _own_png(files, rng):
  said = {"prompt": "a", "seed": 1, "image_index": 0, "batch_size": 1}
  pixels = rng.random((8, 8, 3), np.float32)
  png = images_lib.encode_png(pixels, {"sana_jax": json.dumps(said)})
  return files.add("a.png", png)


def _look(blocks, images, index):
  select = _event(blocks, "select")
  chosen = gradio.SelectData(None, {"index": index, "value": None})
  return _send(blocks, select, select.fn(chosen, images))


def test_an_image_that_is_gone_is_not_offered(build, files, rng):
  blocks = build()
  there, gone = (_own_png(files, rng) for _ in range(2))
  images = [(there, "a"), (gone, "a")]
  pathlib.Path(gone).unlink()
  sent = _look(blocks, images, 1)
  assert sent["picture"]["value"] is None
  assert "any more" in sent["details"]
  offers = ("download", "reproduce")
  assert [sent[name]["interactive"] for name in offers] == [False] * 2
  assert sent["download"]["value"] is None
  sent = _look(blocks, images, 0)
  assert sent["picture"]["path"] == there
  assert [sent[name]["interactive"] for name in offers] == [True] * 2
  assert sent["download"]["value"]["path"] == there


def test_cancelling_is_said_only_while_there_is_a_job(build):
  cancel = _event(build(), "cancel")
  request = gradio.Request(session_hash="abc")
  assert cancel.fn(request) == gradio.skip()
  events = cancel.fn.__self__
  asked = requests.GenerationRequest(prompt="a cat")
  jobs = [Job(asked, "", lambda job: False) for _ in range(3)]
  jobs[2].end(Result([], [], 0, {}))
  events._jobs["abc"] = set(jobs)
  (said,) = cancel.fn(request).values()
  assert "Cancelling" in said
  for job in jobs[:2]:
    with pytest.raises(CancelledError):
      job.check_stopped()
  jobs[2].check_stopped()


def test_every_field_can_be_refused(build):
  blocks = build(controlnet=True)
  generate = _event(blocks, "generate")
  # Its first argument is the images of the visit.
  fields = {field.elem_id: field for field in generate.inputs[1:]}
  assert {"prompt", "image", "mask_image", "control_image"} <= set(fields)
  for name, field in fields.items():
    error = InvalidRequestError(name, "No.")
    (update,) = form_values.refuse(fields, error).items()
    sent = _send(blocks, generate, dict([update]))[name]
    assert sent["elem_classes"] == ["refused"]
    assert sent.get("info", "No.") == "No."
    cleared = form_values.start_over(fields)
    sent = _send(blocks, generate, cleared)[name]
    assert sent["elem_classes"] == []
    assert sent.get("info") == field.info


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"aspect": "custom", "width": 0}, "Width must be from 1"),
    (
      {"aspect": "custom", "width": 33},
      "Width 33 must be a positive multiple of 4, such as 32 or 36.",
    ),
    ({"num_inference_steps": 500}, "Steps must be from 1 to 100, got 500."),
    ({"image_index": -1}, "Image number must be from 0"),
    ({"prompt": ""}, "The prompt is empty"),
  ],
)
def test_messages_name_fields_as_people_see_them(build, changes, message):
  blocks = build()
  generate = _event(blocks, "generate")
  fields = {field.elem_id: field for field in generate.inputs[1:]}
  values = _form(**changes)
  values["solver"] = "FlowEuler"
  *_, outcome = _all(generate.fn, [values[name] for name in fields])
  status = generate.fn.__self__.parts.status
  assert message in html.unescape(outcome[status])
  told = [
    update["info"]
    for update in outcome.values()
    if isinstance(update, dict) and "info" in update
  ]
  assert len(told) == 1
  assert message in told[0]


def _all(generate, values):
  async def collect():
    request = gradio.Request(session_hash="abc", client=None)
    return [updates async for updates in generate(request, [], *values)]

  return asyncio.run(collect())


def test_a_missing_picture_for_a_controlnet_is_said_beside_it(build):
  generate = _event(build(controlnet=True), "generate")
  fields = {field.elem_id: field for field in generate.inputs[1:]}
  values = _form(solver="FlowEuler", controlnet_conditioning_scale=1)
  *_, outcome = _all(generate.fn, [values.get(name) for name in fields])
  said = outcome[generate.fn.__self__.parts.status]
  assert "ControlNet image is missing: images are made with" in said
  assert outcome[fields["control_image"]]["elem_classes"] == ["refused"]


def test_a_mask_of_another_size_is_refused_beside_it(build, tmp_path):
  mask = _file(tmp_path / "m.png", np.full((8, 8), 255, np.uint8))
  image = _file(tmp_path / "i.png", np.full((8, 9), 255, np.uint8))
  blocks = build()
  generate = _event(blocks, "generate")
  fields = {field.elem_id: field for field in generate.inputs[1:]}
  for drawing, refused, message in (
    (None, "image", "There is a mask, but no image"),
    ({"background": image}, "mask_image", "Mask is 8x8 pixels, and the image"),
  ):
    values = _form(mask_image=mask, image=drawing, solver="FlowEuler")
    *_, outcome = _all(generate.fn, [values[name] for name in fields])
    sent = _send(blocks, generate, outcome)
    assert message in sent["status"]
    assert sent[refused]["elem_classes"] == ["refused"]


def test_a_file_is_called_one_where_settings_are_read(build, tmp_path):
  read_image = _event(build(), "read_image")
  broken = tmp_path / "a.png"
  broken.write_bytes(b"no picture")
  (told,) = read_image.fn({"path": str(broken)}).values()
  assert "The file is not a readable picture" in told


def test_an_outcome_that_cannot_be_shown_leaves_no_button_stuck(build):
  blocks = build()
  generate, recover = (_event(blocks, n) for n in ("generate", "recover"))
  assert recover.trigger_only_on_failure
  assert recover.trigger_after == generate._id
  sent = asyncio.run(
    blocks.postprocess_data(recover, blocks.fns[recover._id].fn(), None)
  )
  status, go, cancel = sent
  assert "went wrong" in status
  assert go["interactive"]
  assert not cancel["visible"]


def test_defaults_are_the_checkpoints(components):
  found = components()
  assert found["num_inference_steps"]["value"] == 3
  assert found["guidance_scale"]["value"] == 4.5
  assert found["negative_prompt"]["interactive"]
  values = [value for _, value in found["solver"]["choices"]]
  assert values == ["FlowDPMSolver", "FlowEuler"]
  assert "32×32" in found["aspect"]["info"]
  assert not {"lora", "control_image"} & set(found)


@pytest.mark.usefixtures("unchecked")
def test_a_size_is_called_by_the_nearest_aspect():
  wide, tall = ("4:3", "3:2", "16:9"), ("3:4", "2:3", "9:16")
  sides = {"1:1": (64, 64)}
  sides |= dict.fromkeys(wide, (80, 48)) | dict.fromkeys(tall, (48, 80))

  def image_size(changes):
    width, height = sides[changes["aspect"]]
    return types.SimpleNamespace(width=width, height=height)

  settings = types.SimpleNamespace(replace=dict)
  pipe = types.SimpleNamespace(
    generation_config=settings, image_size=image_size
  )
  presets = form.presets(pipe)
  assert presets == {(64, 64): "1:1", (80, 48): "16:9", (48, 80): "9:16"}


@pytest.mark.parametrize(
  ("name", "prompt"), [("emoji-64", "red heart"), ("mine", "a lighthouse on")]
)
def test_examples_are_of_what_the_checkpoint_knows(
  tokenizer_directory, files, name, prompt
):
  pipe = tiny.make_pipeline(tokenizer_directory)
  made_with = metadata.describe_run(
    pipe, pathlib.Path(name), {"checkpoint_sha256": "unknown"}, {}
  )
  served = service.Service(pipe, made_with=made_with)
  config = page.build(served, files).get_config_file()
  assert served.close()
  (examples,) = (
    c["props"]["samples"]
    for c in config["components"]
    if c["type"] == "dataset"
  )
  assert any(text.startswith(prompt) for (text,) in examples)


def test_sprint_has_neither_negative_prompt_nor_solvers(components):
  found = components(solver=schedules.SCM())
  assert found["num_inference_steps"]["value"] == 2
  assert not found["negative_prompt"]["interactive"]
  assert "no negative branch" in found["negative_prompt"]["info"]
  assert "solver" not in found
  assert "made for 1 to 4" in found["num_inference_steps"]["info"]
  assert "trained with 4 to 5" in found["guidance_scale"]["info"]


def test_a_controlnet_has_a_field_for_its_picture(components):
  assert "control_image" in components(controlnet=True)


def test_the_oldest_files_go_first(files):
  paths = [files.add(f"{i}.png", bytes(1000)) for i in range(4)]
  for age, path in enumerate(reversed(paths)):
    os.utime(path, (1e9 - age, 1e9 - age))
  files.trim()
  assert [os.path.exists(path) for path in paths] == [False, False, True, True]
  assert len(list(files.path.iterdir())) == 2
  assert (os.stat(files.path).st_mode & 0o777) == 0o700


def test_many_small_files_are_too_many(files):
  files.max_files = 3
  paths = [files.add(f"{i}.png", b"a") for i in range(5)]
  for age, path in enumerate(reversed(paths)):
    os.utime(path, (1e9 - age, 1e9 - age))
  files.trim()
  assert [os.path.exists(path) for path in paths] == [False] * 2 + [True] * 3


@pytest.mark.parametrize(
  ("prompt", "name"),
  [
    ("A red apple, on a table!", "a-red-apple-on-a-table-7-2.png"),
    ("../../etc/passwd\0", "etc-passwd-7-2.png"),
    ("苹果", "image-7-2.png"),
    ("x" * 5000, f"{'x' * 48}-7-2.png"),
  ],
)
def test_names_of_files_are_plain(prompt, name):
  assert own_files.file_name(prompt, 7, 2) == name


def test_paths_are_found_however_deep(files):
  inside = {"path": f"{files.path}/a.png"}
  assert not guard.names_foreign_files({"data": [inside, "x", 3]}, files.path)
  for path in (
    "/etc/passwd",
    f"{files.path}/../x",
    f"{files.path}x/a",
    3,
    ["a"],
  ):
    event = {"data": [{"background": inside, "layers": [{"path": path}]}]}
    assert guard.names_foreign_files(event, files.path)


def _form(**changes):
  values = {
    "prompt": "a red apple",
    "negative_prompt": "",
    "aspect": "automatic",
    "width": 32,
    "height": 32,
    "num_inference_steps": 3,
    "guidance_scale": 4.5,
    "seed": 5.0,
    "image_index": 0,
    "randomize": False,
    "num_images": 1,
    "image": None,
    "mask_image": None,
    "strength": 0.5,
  }
  return values | changes


def test_whole_numbers_of_browsers_are_whole():
  request = form_values.to_request(_form(), limits.Limits())
  assert request.seed == 5
  assert isinstance(request.seed, int)
  assert request.strength is None  # without an image it has no effect


def test_a_new_seed_is_drawn_every_time():
  form = _form(randomize=True, image_index=3)
  made = [form_values.to_request(form, limits.Limits()) for _ in range(4)]
  assert len({request.seed for request in made}) == 4
  assert {request.image_index for request in made} == {0}


@pytest.mark.parametrize(
  ("changes", "field"),
  [
    ({"seed": None}, "seed"),
    ({"aspect": "custom", "width": None}, "width"),
    ({"image": {"background": {"path": "/nowhere/x.png"}}}, "image"),
  ],
)
def test_a_form_that_says_too_little_names_the_field(changes, field):
  with pytest.raises(InvalidRequestError) as caught:
    form_values.to_request(_form(**changes), limits.Limits())
  assert caught.value.field == field


def _file(path, picture):
  PIL.Image.fromarray(picture).save(path)
  return {"path": str(path)}


def test_what_is_painted_is_the_mask(tmp_path, rng):
  background = rng.integers(0, 256, (8, 12, 3), dtype=np.uint8)
  layer = np.zeros((8, 12, 4), np.uint8)
  layer[2:5, 3:9] = (225, 29, 72, 255)
  drawing = {
    "background": _file(tmp_path / "b.png", background),
    "layers": [_file(tmp_path / "l.png", layer)],
  }
  request = form_values.to_request(_form(image=drawing), limits.Limits())
  assert (np.asarray(request.image) == background).all()
  expected = np.zeros((8, 12), bool)
  expected[2:5, 3:9] = True
  assert (np.asarray(request.mask_image) == expected).all()
  layer[:] = 0
  drawing["layers"] = [_file(tmp_path / "l.png", layer)]
  request = form_values.to_request(_form(image=drawing), limits.Limits())
  assert request.mask_image is None


@pytest.mark.parametrize("name", ["image", "mask_image", "control_image"])
def test_a_decompression_bomb_is_refused_in_every_field(tmp_path, name):
  path = tmp_path / "bomb.png"
  path.write_bytes(hostile.bomb())
  file = {"path": str(path)}
  given = {name: {"background": file} if name == "image" else file}
  form = _form(controlnet_conditioning_scale=1, **given)
  with pytest.raises(InvalidRequestError, match="too many pixels") as caught:
    form_values.to_request(form, limits.Limits())
  assert caught.value.field == name


def test_a_mask_needs_an_image(tmp_path):
  mask = _file(tmp_path / "m.png", np.full((8, 8), 255, np.uint8))
  with pytest.raises(InvalidRequestError, match="no image") as caught:
    form_values.to_request(_form(mask_image=mask), limits.Limits())
  assert caught.value.field == "image"


def test_what_an_image_says_beyond_the_form_is_told(tokenizer_directory):
  pipe = tiny.make_pipeline(tokenizer_directory)
  description = {
    **pipe.generation_config.to_dict(),
    **{"prompt": "a red apple", "seed": 4, "image_index": 1, "batch_size": 1},
    **{"guidance_scale": 2.0, "guidance_interval": [0.2, 0.8]},
    **{
      "solver": "FlowEuler",
      "checkpoint_sha256": "other",
      "image": "uploaded",
      "control_image": "uploaded",
    },
    **{"lora": ["style"], "lora_scale": [0.7]},
  }
  made_with = {"checkpoint_sha256": "own"}
  values, notes = form_from_image.values(
    json.loads(json.dumps(description)), pipe, ("style",), made_with
  )
  assert values["guidance_scale"] == 2
  assert values["solver"] == "FlowEuler"
  assert (values["lora"], values["lora_scale"]) == ("style", 0.7)
  assert (values["seed"], values["image_index"]) == (4, 1)
  told = "; ".join(notes)
  for part in (
    *("another checkpoint", "add Image, ControlNet image"),
    *("no field for guidance_interval",),
  ):
    assert part in told
  _, notes = form_from_image.values(description, pipe, (), made_with)
  assert "does not have its LoRA" in "; ".join(notes)


@pytest.mark.parametrize("steps", [None, 2, 5])
@pytest.mark.parametrize("solver", [None, schedules.SCM()])
def test_nothing_is_told_of_an_image_made_here(
  tokenizer_directory, steps, solver
):
  options = {} if solver is None else {"solver": solver}
  pipe = tiny.make_pipeline(tokenizer_directory, **options)
  maker = making.Maker(pipe, adapters.Adapters(pipe.transformer, {}), None)
  asked = requests.GenerationRequest(
    prompt="a red apple", seed=3, num_inference_steps=steps
  )
  checked = requests.check(asked, pipe, limits.Limits())
  description = json.loads(json.dumps(maker._describe(checked)))
  values, notes = form_from_image.values(description, pipe, (), maker.made_with)
  assert notes == []
  assert values["num_inference_steps"] == checked.num_inference_steps
  # Else the image and the strength that the form has would be used.
  gone = ("image", "mask_image", "control_image")
  assert [values[name] for name in gone] == [None] * 3
  assert values["strength"] == (0.6 if solver is None else 0.5)


def test_pictures_that_an_image_was_made_from_stay_in_the_form(
  tokenizer_directory, rng
):
  pipe = tiny.make_pipeline(tokenizer_directory)
  maker = making.Maker(pipe, adapters.Adapters(pipe.transformer, {}), None)
  picture = PIL.Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8))
  asked = requests.GenerationRequest(
    prompt="a red apple", seed=3, image=picture, strength=0.5
  )
  checked = requests.check(asked, pipe, limits.Limits())
  values, notes = form_from_image.values(
    maker._describe(checked), pipe, (), maker.made_with
  )
  assert "image" not in values
  assert values["mask_image"] is None
  assert values["strength"] == 0.5
  assert notes == [
    "it was made from pictures that it does not contain: add Image"
  ]


def test_how_much_a_controlnet_adds_is_shown_and_comes_back(
  tokenizer_directory,
):
  pipe = tiny.make_pipeline(tokenizer_directory, controlnet=True)
  maker = making.Maker(pipe, adapters.Adapters(pipe.transformer, {}), None)
  name = "controlnet_conditioning_scale"
  asked = requests.GenerationRequest(
    prompt="a red apple",
    seed=3,
    control_image=PIL.Image.new("RGB", (32, 32)),
    controlnet_conditioning_scale=0.35,
  )
  checked = requests.check(asked, pipe, limits.Limits())
  described = maker._describe(checked)
  values, notes = form_from_image.values(described, pipe, (), maker.made_with)
  assert values[name] == 0.35
  assert notes == [
    "it was made from pictures that it does not contain: add ControlNet image"
  ]
  assert "<dt>ControlNet scale</dt><dd>0.35</dd>" in markup.settings(described)
  del described["control_image"]
  assert "ControlNet" not in markup.settings(described)
  plain = tiny.make_pipeline(tokenizer_directory)
  values, notes = form_from_image.values(described, plain, (), maker.made_with)
  assert name not in values
  assert "no field for controlnet_conditioning_scale" in notes[-1]


def test_an_own_image_is_read_however_large(tmp_path, rng):
  pixels = rng.random((64, 64, 3), np.float32)
  said = {"prompt": "a", "seed": 1, "image_index": 0, "batch_size": 1}
  png = images_lib.encode_png(pixels, {"sana_jax": json.dumps(said)})
  path = tmp_path / "own.png"
  path.write_bytes(png)
  assert form_from_image.read_own(str(path)) == said
  small = limits.Limits(max_upload_bytes=100)
  with pytest.raises(InvalidRequestError, match="at most 100"):
    form_from_image.read(png, small)
  path.unlink()
  with pytest.raises(InvalidRequestError, match="any more"):
    form_from_image.read_own(str(path))


@pytest.mark.parametrize(
  ("update", "text"),
  [
    (Update("queued", 2), "Waiting: 2 before you."),
    (Update("queued", 0), "You are next."),
    (Update("encode"), "Reading the prompt."),
    (Update("denoise", 0, 3, 20), "Step 3 of 20."),
    (Update("denoise", 0, 0, 0, None, compiling=True), "takes a while once"),
    (Update("decode"), "Finishing."),
  ],
)
def test_a_visitor_is_told_where_a_job_stands(update, text):
  assert text in handlers.describe(update, is_ready=True)


def test_who_waits_is_told_that_the_server_is_ending():
  said = handlers.describe(Update("queued", 3), is_ready=True, is_closing=True)
  assert "The server is shutting down; 3 before you." in said
  said = handlers.describe(Update("decode"), is_ready=True, is_closing=True)
  assert "Finishing." in said


def test_an_outcome_is_not_announced_as_finishing(build, monkeypatch):
  def fail(*args):
    raise FloatingPointError("The decoder's result is not finite.")

  monkeypatch.setattr(making.Maker, "make", fail)
  generate = _event(build(), "generate")
  fields = {field.elem_id: field for field in generate.inputs[1:]}
  values = _form(solver="FlowEuler")
  said = _all(generate.fn, [values[name] for name in fields])
  status = generate.fn.__self__.parts.status
  assert "not finite" in html.unescape(said[-1][status])
  assert not any("Finishing" in update[status] for update in said)


def test_what_was_said_of_a_file_goes_with_it(build):
  blocks = build()
  forget = _event(blocks, "forget_image")
  assert _send(blocks, forget, forget.fn())["from_image_status"] == ""
  (target,) = forget.targets
  assert blocks.blocks[target[0]].elem_id == "from_image"


def test_nothing_of_a_prompt_is_markup():
  shown = markup.settings({"prompt": '<img src=x onerror="alert(1)">'})
  assert "<img" not in shown
  assert "<b>" not in markup.message("<b>", kind="error")


def test_a_visitor_is_told_what_is_worth_knowing_of_the_images(build):
  generate = _event(build(), "generate")
  fields = {field.elem_id: field for field in generate.inputs[1:]}
  values = _form(
    solver="FlowEuler", guidance_scale=12, aspect="custom", width=16, height=16
  )
  *_, outcome = _all(generate.fn, [values[name] for name in fields])
  assert outcome[generate.fn.__self__.parts.status] == (
    markup.message("1 image of seed 5.")
    + markup.message(
      "Outside the trained range: Guidance 12 (more than 10 burns colours); "
      "16x16 pixels (this checkpoint was trained around 32x32).",
      kind="warning",
    )
  )


def test_warnings_are_shown_in_the_words_of_the_page():
  warning = "Outside the trained range: guidance_scale 12: <b>."
  shown = markup.outcome("1 image.", [warning, "Another."])
  assert shown.startswith(markup.message("1 image."))
  assert "range: Guidance 12: &lt;b&gt;." in shown
  assert shown.count('class="message warning"') == 2


def test_a_preview_keeps_its_shape(rng):
  preview = rng.integers(0, 256, (8, 24, 3), dtype=np.uint8)
  shown = markup.progress("Step 1 of 4.", 1, 4, preview)
  assert 'aria-valuenow="1"' in shown
  assert "width: 25.0%" in shown
  assert "1140px" in shown  # three times as wide as it is high
