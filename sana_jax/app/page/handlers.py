"""What happens on the page: the functions behind its buttons and fields."""

import asyncio
import dataclasses
import pathlib
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent import futures
from typing import Any

import gradio
from absl import logging

from sana_jax.app.errors import (
  BusyError,
  CancelledError,
  ClosedError,
  InvalidRequestError,
  JobError,
)
from sana_jax.app.jobs import Job, Result, Update
from sana_jax.app.page import form, form_from_image, form_values, markup
from sana_jax.app.page.own_files import PageFiles, file_name
from sana_jax.app.service import Service

# Images that a visitor's gallery keeps.
_MAX_IMAGES = 48
_CAPTION_LENGTH = 80
READY = "Describe an image, and press Generate."
_UNEXPECTED = "Something went wrong on the server; its log says what."

# By component. A visitor's list of (path, caption) is the state "images", the
# number of the image that is looked at the state "selected".
Updates = dict[Any, Any]
Images = list[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Parts:
  """The components of the page besides the form's fields."""

  generate: gradio.Button
  cancel: gradio.Button
  status: gradio.HTML
  gallery: gradio.Gallery
  chosen: gradio.Column
  picture: gradio.Image
  details: gradio.HTML
  download: gradio.DownloadButton
  reproduce: gradio.Button
  sides: gradio.Row
  from_image: gradio.File
  from_image_status: gradio.HTML
  images: gradio.State
  selected: gradio.State


class Events:
  """The functions that the page's events call.

  Each visitor has a session; what one does is seen by nobody else.
  """

  def __init__(
    self,
    service: Service,
    files: PageFiles,
    fields: form.Fields,
    parts: Parts,
  ):
    self._service = service
    self._files = files
    self.fields = fields
    self.parts = parts
    self._jobs: dict[str, set[Job]] = {}  # by session
    # A thread waits for each job, and none of Gradio's does.
    self.max_jobs = service.limits.max_waiting + 2
    self._waiting = futures.ThreadPoolExecutor(self.max_jobs, "page")

  async def generate(
    self, request: gradio.Request, images: Images, *values: Any
  ) -> AsyncIterator[Updates]:
    """Makes what the form says, and shows how far it is."""
    parts = self.parts
    filled = dict(zip(self.fields, values, strict=True))
    yield form_values.start_over(self.fields) | {
      parts.generate: gradio.update(interactive=False),
      parts.cancel: gradio.update(visible=True),
      parts.status: markup.message("Sending the request."),
      parts.chosen: gradio.update(visible=False),
    }
    session = str(request.session_hash)
    host = request.client.host if request.client else ""
    try:
      job = await asyncio.to_thread(self._submit, filled, host)
      self._jobs.setdefault(session, set()).add(job)
      try:
        async for update in self._follow(job):
          if not job.done:  # the outcome is said below
            yield {parts.status: self._describe(update)}
      finally:
        job.cancel()  # no effect on one that is done
        self._jobs[session].discard(job)
        if not self._jobs[session]:
          del self._jobs[session]
      result = job.result()
      outcome = await asyncio.to_thread(self._show, result, images)
    except InvalidRequestError as error:
      outcome = form_values.refuse(self.fields, error)
      told = error.told(form.LABELS)
      outcome[parts.status] = markup.message(told, kind="error")
    except (BusyError, ClosedError, CancelledError, JobError) as error:
      kind = "note" if isinstance(error, CancelledError) else "error"
      outcome = {parts.status: markup.message(str(error), kind=kind)}
    except Exception:  # a visitor sees no stack traces, whatever happens
      logging.exception("an event of the page failed")
      outcome = {parts.status: markup.message(_UNEXPECTED, kind="error")}
    # What was looked at before is shown again if nothing new was made.
    yield (
      {parts.chosen: gradio.update(visible=bool(images))}
      | outcome
      | {
        parts.generate: gradio.update(interactive=True),
        parts.cancel: gradio.update(visible=False),
      }
    )

  def recover(self) -> Updates:
    """Lets a visitor go on whose browser could not be told the outcome."""
    return {
      self.parts.status: markup.message(_UNEXPECTED, kind="error"),
      self.parts.generate: gradio.update(interactive=True),
      self.parts.cancel: gradio.update(visible=False),
    }

  def cancel(self, request: gradio.Request) -> Updates:
    """Gives up what the visitor's session is waiting for."""
    if not self._cancel(str(request.session_hash)):
      return gradio.skip()  # the outcome is said, or on its way
    return {self.parts.status: markup.message("Cancelling.")}

  def leave(self, request: gradio.Request) -> None:
    """Gives up what nobody waits for any more."""
    self._cancel(str(request.session_hash))

  def select(self, event: gradio.SelectData, images: Images) -> Updates:
    """Shows the settings of an image."""
    number = event.index
    if not isinstance(number, int) or not 0 <= number < len(images):
      return {self.parts.selected: None}
    return self._look(images, number)

  def reproduce(self, images: Images, selected: int | None) -> Updates:
    """Fills the form with the settings of the image that is looked at."""
    if selected is None or not 0 <= selected < len(images):
      return gradio.skip()
    path, _ = images[selected]
    status = self.parts.status
    return self._fill(lambda: form_from_image.read_own(path), status)

  def read_image(self, file: Mapping[str, Any] | None) -> Updates:
    """Fills the form with the settings of an image that is handed in."""
    limits = self._service.limits

    def read() -> dict[str, Any]:
      data = form_values.upload_bytes(file, form_from_image.FIELD, limits)
      return form_from_image.read(data or b"", limits)

    return self._fill(read, self.parts.from_image_status)

  def forget_image(self) -> Updates:
    """Takes away what was said of a file that is taken away."""
    return {self.parts.from_image_status: ""}

  def show_size(self, aspect: str) -> Updates:
    """Shows the fields for width and height if they are used."""
    visible = aspect == form.CUSTOM
    return {self.parts.sides: gradio.update(visible=visible)}

  def _submit(self, values: Mapping[str, Any], host: str) -> Job:
    request = form_values.to_request(values, self._service.limits)
    return self._service.submit(request, client=host)

  def _describe(self, update: Update) -> str:
    service = self._service
    return describe(
      update, is_ready=service.ready.is_set(), is_closing=service.closing
    )

  async def _follow(self, job: Job) -> AsyncIterator[Update]:
    updates = job.updates()
    loop = asyncio.get_running_loop()
    while True:
      update = await loop.run_in_executor(self._waiting, next, updates, None)
      if update is None:
        return
      yield update

  def _cancel(self, session: str) -> bool:
    """Gives up a session's jobs; says whether there were any at work."""
    jobs = [job for job in self._jobs.get(session, ()) if not job.done]
    for job in jobs:
      job.cancel()
    return bool(jobs)

  def _show(self, result: Result, images: Images) -> Updates:
    """Puts images in front of the visitor's others, and shows the first."""
    prompt, first = result.settings["prompt"], result.settings["image_index"]
    made = [
      (
        self._files.add(file_name(prompt, result.seed, first + i), png),
        _caption(prompt),
      )
      for i, png in enumerate(result.pngs)
    ]
    kept = [image for image in images if pathlib.Path(image[0]).exists()]
    images = [*made, *kept][:_MAX_IMAGES]
    count = len(made)
    told = f"{count} image{'s' if count > 1 else ''} of seed {result.seed}."
    return self._look(images, 0) | {
      self.parts.images: images,
      self.parts.gallery: gradio.update(
        value=images, visible=True, selected_index=0
      ),
      self.parts.status: markup.outcome(told, result.warnings),
      self.fields["seed"]: result.seed,
      self.fields["image_index"]: first,
    }

  def _look(self, images: Images, number: int) -> Updates:
    parts = self.parts
    path, _ = images[number]
    try:
      description = form_from_image.read_own(path)
    except InvalidRequestError as error:
      return {
        parts.selected: None,
        parts.chosen: gradio.update(visible=True),
        parts.picture: gradio.update(value=None),
        parts.details: markup.message(error.message, kind="error"),
        parts.download: gradio.update(value=None, interactive=False),
        parts.reproduce: gradio.update(interactive=False),
      }
    return {
      parts.selected: number,
      parts.chosen: gradio.update(visible=True),
      parts.picture: path,
      parts.details: markup.settings(description),
      parts.download: gradio.update(value=path, interactive=True),
      parts.reproduce: gradio.update(interactive=True),
    }

  def _fill(
    self, read: Callable[[], dict[str, Any]], status: gradio.HTML
  ) -> Updates:
    """Returns the form as an image says, or what is wrong with the image."""
    service = self._service
    try:
      values, notes = form_from_image.values(
        read(), service.pipe, service.lora_names, service.made_with
      )
    except InvalidRequestError as error:
      told = error.told({form_from_image.FIELD: "The file"})
      return {status: markup.message(told, kind="error")}
    text = "The form has the settings of the image."
    if notes:
      text += f" It may come out differently: {'; '.join(notes)}."
    filled = {
      self.fields[name]: value
      for name, value in values.items()
      if name in self.fields
    }
    return filled | {status: markup.message(text)}


def describe(
  update: Update, *, is_ready: bool, is_closing: bool = False
) -> str:
  """Says where a job stands, as HTML.

  Args:
    is_ready: whether the server has made its first images.
    is_closing: whether it is to end, and may not come to this job.
  """
  step, total = update.step, update.num_steps
  if update.stage == "queued" and is_closing:
    text = (
      f"The server is shutting down; {update.position} before you. It may not "
      "come to your images."
    )
  elif update.stage == "queued" and not is_ready:
    text = "The server is getting ready."
  elif update.stage == "queued" and update.position:
    text = f"Waiting: {update.position} before you."
  elif update.stage == "queued":
    text = "You are next."
  elif update.compiling:
    text = "Preparing for images of this kind, which takes a while once."
  elif update.stage == "encode":
    text = "Reading the prompt."
  elif update.stage == "denoise" and step:
    text = f"Step {step} of {total}."
  elif update.stage == "denoise":
    text = "Starting."
  else:
    text = "Finishing."
  return markup.progress(text, step, total, update.preview)


def _caption(prompt: str) -> str:
  line = " ".join(prompt.split())
  if len(line) <= _CAPTION_LENGTH:
    return line
  return f"{line[: _CAPTION_LENGTH - 1]}…"
