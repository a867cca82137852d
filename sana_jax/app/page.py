"""The web page: a form, progress while images are made, and a gallery."""

import contextlib
import os
import pathlib
from collections.abc import AsyncIterator
from typing import Any

import fastapi
import gradio

from sana_jax.app import (
  page_events,
  page_files,
  page_guard,
  page_html,
  settings_form,
)
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
_EMOJI_SIDE = 64
_CLEANING = (600, 24 * 3600)  # how often, and after how long, in seconds
_EVENT: dict[str, Any] = {
  "show_progress": "hidden",
  "api_visibility": "private",
  # Values as the browser sends them: `form_values` reads them, so that nothing
  # of an upload is decoded before it was looked at.
  "preprocess": False,
}


def mount(app: fastapi.FastAPI, service: Service) -> None:
  """Serves the page at "/"; routes that `app` has already come first."""
  files = page_files.PageFiles()
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
  mounted.app = page_guard.guard(mounted.app, files.path)
  inner = app.router.lifespan_context

  @contextlib.asynccontextmanager
  async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[Any]:
    async with files.kept_small(), inner(app) as state:
      yield state

  app.router.lifespan_context = lifespan


def build(service: Service, files: page_files.PageFiles) -> gradio.Blocks:
  """Makes the page for a service."""
  with gradio.Blocks(
    title=f"{_name(service)} · sana_jax",
    analytics_enabled=False,
    delete_cache=_CLEANING,
    fill_width=True,
  ) as blocks:
    fields, parts = _layout(service)
    _connect(blocks, page_events.Events(service, files, fields, parts))
  slots = service.limits.max_waiting + 16
  blocks.max_threads = slots  # the number of events at a time
  blocks.queue(max_size=2 * slots)
  return blocks
