"""The web page: a form, progress while images are made, and a gallery."""

import contextlib
import dataclasses
import html
import os
import pathlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

import fastapi
import gradio

from sana_jax.app.page import form, guard, handlers, markup, own_files
from sana_jax.app.service import Service

_CSS = pathlib.Path(__file__).with_name("page.css")
# What the bundled model was trained on: names of emoji.
_EMOJI = (
  "woman firefighter: medium skin tone",
  "grinning face with smiling eyes",
  "flag: France",
  "woman: red hair",
  "red heart",
  "woman health worker: dark skin tone",
)
_SCENES = (
  "a lighthouse on a cliff at dusk, waves below, long exposure",
  "a bowl of ramen on a wooden table, steam, soft window light",
  "a paper-cut illustration of a fox in a birch forest",
  "a small robot watering plants on a balcony, watercolour",
)
_CLEANING = (600, 24 * 3600)  # how often, and after how long, in seconds
_EVENT: dict[str, Any] = {
  "show_progress": "hidden",
  "api_visibility": "private",
  # Values as the browser sends them: `form_values` reads them, so that nothing
  # of an upload is decoded before it was looked at.
  "preprocess": False,
}


class Mounted(NamedTuple):
  """What the server does about a page when it ends.

  Attributes:
    end_streams: ends the streams that open pages hold, which never end by
      themselves; to be called in the server's loop.
    remove_files: removes results and uploads, as the end of the application's
      lifespan does; for an end without that.
  """

  end_streams: Callable[[], None]
  remove_files: Callable[[], None]


def mount(app: fastapi.FastAPI, service: Service) -> Mounted:
  """Serves the page at "/"; routes that `app` has already come first."""
  files = own_files.PageFiles()
  # Gradio asks for this when components are made, and when uploads come.
  os.environ["GRADIO_TEMP_DIR"] = str(files.path)
  gradio.mount_gradio_app(
    app,
    build(service, files),
    path="/",
    footer_links=[],
    run_history=False,
    show_error=False,
    max_file_size=service.limits.max_upload_bytes,
    ssr_mode=False,
    mcp_server=False,
    theme=_theme(),
    css_paths=_CSS,
  )
  mounted = app.routes[-1]
  end_streams = mounted.app.stop_event.set
  mounted.app = guard.guard(
    mounted.app, files.path, service.limits.max_upload_bytes
  )
  inner = app.router.lifespan_context

  @contextlib.asynccontextmanager
  async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[Any]:
    async with files.kept_small(), inner(app) as state:
      yield state

  app.router.lifespan_context = lifespan
  return Mounted(end_streams, files.remove)


def build(service: Service, files: own_files.PageFiles) -> gradio.Blocks:
  """Makes the page for a service."""
  with gradio.Blocks(
    title=f"{service.model_name} · sana_jax",
    analytics_enabled=False,
    delete_cache=_CLEANING,
    fill_width=True,
  ) as blocks:
    fields, parts = _layout(service)
    _connect(blocks, handlers.Events(service, files, fields, parts))
  slots = service.limits.max_waiting + 16
  blocks.max_threads = slots  # the number of events at a time
  blocks.queue(max_size=2 * slots)
  return blocks


def _layout(
  service: Service,
) -> tuple[form.Fields, handlers.Parts]:
  """Places everything: what is made on one side, how on the other."""
  pipe, limits = service.pipe, service.limits
  made_by = f"<p>{html.escape(service.model_name)}</p>"
  gradio.HTML(f"<h1>sana_jax</h1>{made_by}", elem_id="title", padding=False)
  with gradio.Row(equal_height=False):
    with gradio.Column(scale=3, min_width=320):
      fields = form.texts(pipe, limits)
      _examples(service.model_name, fields["prompt"])
      results = _results()
    with gradio.Column(scale=2, min_width=300, elem_id="settings"):
      sizes, sides = form.sizes(pipe)
      fields |= sizes
      fields |= form.sampling(pipe, limits)
      fields |= form.seeds(limits)
      fields |= form.adapters(service.lora_names)
      with gradio.Accordion("Begin with an image", open=False):
        fields |= form.pictures(pipe)
      if pipe.controlnet is not None:
        fields |= form.control()
      with gradio.Accordion("Settings from an image", open=False):
        from_image = gradio.File(
          label="A PNG that was made here, or by sample.py",
          file_types=[".png"],
          height=160,
          elem_id="from_image",
        )
        status = gradio.HTML(elem_id="from_image_status")
  parts = handlers.Parts(
    **results,
    sides=sides,
    from_image=from_image,
    from_image_status=status,
    images=gradio.State([]),
    selected=gradio.State(None),
  )
  return fields, parts


def _results() -> dict[str, gradio.blocks.Block]:
  """Places the buttons, the progress, and what was made."""
  with gradio.Row():
    generate = gradio.Button("Generate", variant="primary", scale=3)
    cancel = gradio.Button("Cancel", visible=False, scale=1, min_width=90)
  status = gradio.HTML(
    markup.message(handlers.READY), elem_id="status", padding=False
  )
  with gradio.Column(visible=False, elem_id="chosen") as chosen:
    picture = gradio.Image(
      label="Image",
      show_label=False,
      interactive=False,
      height=400,
      buttons=["fullscreen"],
      elem_id="picture",
    )
    details = gradio.HTML(padding=False, elem_id="details")
    with gradio.Row():
      download = gradio.DownloadButton(
        "Download PNG", size="sm", min_width=120, elem_id="download"
      )
      reproduce = gradio.Button(
        "Reproduce", size="sm", min_width=120, elem_id="reproduce"
      )
  gallery = gradio.Gallery(
    label="All images, newest first",
    show_label=False,
    object_fit="contain",
    allow_preview=False,
    interactive=False,
    buttons=[],
    visible=False,
    elem_id="gallery",
  )
  return {
    "generate": generate,
    "cancel": cancel,
    "status": status,
    "gallery": gallery,
    "chosen": chosen,
    "picture": picture,
    "details": details,
    "download": download,
    "reproduce": reproduce,
  }


def _examples(model_name: str, prompt: gradio.components.Component) -> None:
  """Offers prompts that the checkpoint can make something of."""
  gradio.Examples(
    [[text] for text in (_EMOJI if "emoji" in model_name else _SCENES)],
    [prompt],
    label="Examples",
    api_visibility="private",
    elem_id="examples",
  )


def _connect(blocks: gradio.Blocks, events: handlers.Events) -> None:
  """Says what happens when."""
  fields, parts = events.fields, events.parts
  everything = [
    *fields.values(),
    *(getattr(parts, field.name) for field in dataclasses.fields(parts)),
  ]
  made = gradio.on(
    [parts.generate.click, fields["prompt"].submit],
    events.generate,
    [parts.images, *fields.values()],
    everything,
    concurrency_limit=events.max_jobs,
    trigger_mode="once",
    **_EVENT,
  )
  # An update that Gradio refuses is nothing that the function could catch.
  made.failure(
    events.recover,
    [],
    [parts.status, parts.generate, parts.cancel],
    concurrency_limit=None,
    **_EVENT,
  )
  for trigger, function, inputs in (
    (parts.cancel.click, events.cancel, []),
    (parts.gallery.select, events.select, [parts.images]),
    (
      parts.reproduce.click,
      events.reproduce,
      [parts.images, parts.selected],
    ),
    (parts.from_image.upload, events.read_image, [parts.from_image]),
    (parts.from_image.clear, events.forget_image, []),
    (fields["aspect"].change, events.show_size, [fields["aspect"]]),
  ):
    trigger(function, inputs, everything, concurrency_limit=None, **_EVENT)
  blocks.unload(events.leave)


def _theme() -> gradio.Theme:
  """Quiet, and with the fonts that the visitor's system has."""
  return gradio.themes.Base(
    primary_hue="indigo",
    secondary_hue="indigo",
    neutral_hue="slate",
    font=["system-ui", "sans-serif"],
    font_mono=["ui-monospace", "monospace"],
  ).set(
    block_border_width="1px",
    block_shadow="none",
  )
