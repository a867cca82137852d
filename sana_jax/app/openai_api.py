"""The OpenAI images API, as far as a text-to-image model has it.

Source: https://platform.openai.com/docs/api-reference/images/create.
"""

import asyncio
import base64
import hmac
import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import fastapi
import PIL.Image
from absl import logging
from fastapi.responses import JSONResponse
from starlette import exceptions

from sana_jax.app import bodies, errors, requests, uploads
from sana_jax.app.jobs import Job, Result
from sana_jax.app.service import Service

ROOT = "/v1/"
# Fields with a meaning of their own; others are those of GenerationRequest.
_OPENAI_FIELDS = (
  *("prompt", "model", "n", "size", "response_format", "output_format", "user"),
)
# Fields of that API without a meaning here, with values that ask for nothing.
_NEUTRAL = {
  "quality": ("auto", "standard"),
  "style": ("vivid",),
  "background": ("auto", "opaque"),
  "moderation": ("auto",),
  "output_compression": (100,),
  "partial_images": (0,),
  "stream": (False,),
}
EXTENSIONS = (
  *("negative_prompt", "seed", "num_inference_steps", "guidance_scale"),
  *("aspect", "pag_scale", "solver", "lora", "lora_scale", "image_index"),
  *("control_image", "controlnet_conditioning_scale"),
)
_WHOLE = ("seed", "num_inference_steps", "image_index")
_PARAMS = {"num_images": "n", "height": "size", "width": "size"}
# In messages.
_NAMES = {
  "num_images": "n",
  "height": "size: the height",
  "width": "size: the width",
}
_MAX_USER = 256
# Bodies with pictures that are in memory at a time.
_LARGE_BODIES = 4
_LOOKS = ("GET", "HEAD")
_METHODS = (*_LOOKS, "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def install(
  app: fastapi.FastAPI, service: Service, *, api_key: str | None = None
) -> None:
  """Adds the API's routes, and its shape of errors.

  Args:
    api_key: what clients must send as a bearer token; None: nothing.
  """
  created = int(time.time())
  model = {
    "id": service.model_name,
    "object": "model",
    "created": created,
    "owned_by": "sana_jax",
  }

  def authorise(request: fastapi.Request) -> None:
    given = request.headers.get("authorization", "")
    expected = f"Bearer {api_key}"
    # Bytes: texts beyond ASCII cannot be compared.
    if api_key is not None and not hmac.compare_digest(
      given.encode(), expected.encode()
    ):
      raise _ApiError(
        401,
        "The API key is missing or wrong; send it as 'Authorization: Bearer "
        "KEY'.",
        code="invalid_api_key",
      )

  max_body_bytes = bodies.MAX_BODY_BYTES
  if service.pipe.controlnet is not None:
    max_body_bytes += 4 * math.ceil(service.limits.max_upload_bytes / 3)
  # Others wait unread.
  large_bodies = asyncio.Semaphore(_LARGE_BODIES)
  protected = [fastapi.Depends(authorise)]

  _install_health(app, service)

  @app.get("/v1/models", dependencies=protected)
  async def models() -> JSONResponse:
    return JSONResponse({"object": "list", "data": [model]})

  @app.get("/v1/models/{name}", dependencies=protected)
  async def one_model(name: str) -> JSONResponse:
    _check_model(name, service)
    return JSONResponse(model)

  @app.post("/v1/images/generations", dependencies=protected)
  async def generations(request: fastapi.Request) -> JSONResponse:
    if bodies.is_large(request):
      async with large_bodies:
        job = await _receive(request, service, max_body_bytes)
    else:
      job = await _receive(request, service, bodies.MAX_BODY_BYTES)
    result = await _result(job, request)
    return await asyncio.to_thread(_response, result)

  # Else these would be asked of the page.
  @app.api_route("/v1", methods=list(_METHODS))
  @app.api_route("/v1/{path:path}", methods=list(_METHODS))
  async def nothing(request: fastapi.Request) -> None:
    asked = f"{request.method} {request.scope['path'][:100]}"
    raise _ApiError(404, f"There is no {asked} here.")

  app.add_exception_handler(_ApiError, _on_error)
  for kind in (
    *(bodies.BodyError, errors.InvalidRequestError, errors.BusyError),
    *(errors.ClosedError, errors.JobError, exceptions.HTTPException),
    Exception,
  ):
    app.add_exception_handler(kind, _on_error)


def _install_health(app: fastapi.FastAPI, service: Service) -> None:
  @app.api_route("/health", methods=list(_LOOKS))
  async def health() -> JSONResponse:
    status = "ok" if service.ready.is_set() else "warming up"
    if service.closing:
      status = "closing"
    return JSONResponse(
      {"status": status, "waiting": service.num_waiting},
      503 if service.closing else 200,
    )

  # Else these would be asked of the page.
  @app.api_route("/health", methods=sorted(set(_METHODS) - set(_LOOKS)))
  async def no_change(request: fastapi.Request) -> None:
    allowed = ", ".join(_LOOKS)
    raise _ApiError(
      405,
      f"/health has no {request.method}, only {allowed}.",
      headers={"Allow": allowed},
    )


def refusal(status: int, message: str) -> fastapi.Response:
  """Returns an error in the API's shape, for what never came to its routes."""
  return _error_response(_ApiError(status, message))


class _ApiError(Exception):
  """An error as the API says it."""

  def __init__(
    self,
    status: int,
    message: str,
    *,
    kind: str = "invalid_request_error",
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
  ):
    super().__init__(message)
    self.status = status
    self.kind = kind
    self.param = param
    self.code = code
    self.headers = headers


async def _receive(
  request: fastapi.Request, service: Service, max_bytes: int
) -> Job:
  """Reads what is asked for, and puts it into the queue."""
  fields = await bodies.read_object(request, max_bytes)
  client = request.client.host if request.client else ""
  # A picture takes a while.
  return await asyncio.to_thread(_submit, fields, service, client)


def _submit(fields: Mapping[str, Any], service: Service, client: str) -> Job:
  request = _translate(fields, service)
  return service.submit(request, client, user=fields.get("user"))


def _translate(
  fields: Mapping[str, Any], service: Service
) -> requests.GenerationRequest:
  """Makes a request of the API's fields.

  Raises:
    InvalidRequestError: a field that is unknown, or cannot be.
  """
  for name, value in fields.items():
    if name in _NEUTRAL:
      _check_neutral(name, value)
    elif name not in _OPENAI_FIELDS + EXTENSIONS:
      raise errors.InvalidRequestError(
        name[:100],
        f"Unknown field {name[:100]!r}; there are "
        f"{', '.join(_OPENAI_FIELDS + EXTENSIONS)}.",
      )
  _check_model(fields.get("model"), service)
  if fields.get("response_format") not in (None, "b64_json"):
    raise errors.InvalidRequestError(
      "response_format",
      "response_format must be 'b64_json': images are not kept here, so there "
      "is no url.",
    )
  if fields.get("output_format") not in (None, "png"):
    raise errors.InvalidRequestError(
      "output_format", "output_format must be 'png'."
    )
  user = fields.get("user")
  if user is not None and not (
    isinstance(user, str) and len(user) <= _MAX_USER
  ):
    raise errors.InvalidRequestError(
      "user", f"user must be a text of at most {_MAX_USER} characters."
    )
  values = {name: fields[name] for name in EXTENSIONS if name in fields}
  # null is the usual value, as in that API.
  values = {name: value for name, value in values.items() if value is not None}
  values |= {name: _whole(values[name]) for name in _WHOLE if name in values}
  if (name := "control_image") in values:
    values[name] = _picture(name, values[name], service)
  if fields.get("n") is not None:
    values["num_images"] = _whole(fields["n"])
  if fields.get("prompt") is not None:
    values["prompt"] = fields["prompt"]
  size = _size(fields.get("size"))
  if size and "aspect" in values:
    raise errors.InvalidRequestError(
      "aspect", "aspect cannot go with size; give one or the other."
    )
  return requests.from_mapping(values | size)


def _whole(value: Any) -> Any:
  """Returns 1 for 1.0: to JSON, and many of its writers, they are the same."""
  whole = isinstance(value, float) and value.is_integer()
  return int(value) if whole else value


def _check_neutral(name: str, value: Any) -> None:
  value = _whole(value)
  # To Python, 0 is False, which a client cannot have meant.
  same = [one for one in _NEUTRAL[name] if type(one) is type(value)]
  if value is not None and value not in same:
    allowed = " or ".join(json.dumps(one) for one in _NEUTRAL[name])
    raise errors.InvalidRequestError(
      name, f"{name} has no other values here than {allowed}; leave it out."
    )


def _picture(name: str, text: Any, service: Service) -> PIL.Image.Image:
  if service.pipe.controlnet is None:  # not to decode it in vain
    raise requests.no_controlnet(name)
  try:
    data = base64.b64decode(text, validate=True)
  except (TypeError, ValueError) as error:
    raise errors.InvalidRequestError(
      name, f"{name} must be a text: a picture's file in base64."
    ) from error
  return uploads.read_picture(data, service.limits, field=name)


def _size(size: Any) -> dict[str, int]:
  if size is None or size == "auto":
    return {}
  match = re.fullmatch(
    r"([0-9]{1,6})x([0-9]{1,6})", size if isinstance(size, str) else ""
  )
  if match is None:
    raise errors.InvalidRequestError(
      "size", "size must be 'auto', or width and height such as '1024x1024'."
    )
  return {"width": int(match[1]), "height": int(match[2])}


def _check_model(name: Any, service: Service) -> None:
  if name is not None and name != service.model_name:
    raise _ApiError(
      404,
      f"There is no model {requests.spelled(name)} here, only "
      f"{service.model_name!r}; leave model out, or give that.",
      param="model",
      code="model_not_found",
    )


async def _result(job: Job, request: fastapi.Request) -> Result:
  """Waits for a job, and cancels it when its client has gone."""
  gone = asyncio.ensure_future(_disconnected(request))
  made = asyncio.wrap_future(job.future)
  try:
    await asyncio.wait({gone, made}, return_when=asyncio.FIRST_COMPLETED)
    if not made.done():
      job.cancel()
    return await made
  finally:
    gone.cancel()
    # The server may give a connection up while we wait.
    if not job.done:
      job.cancel()


async def _disconnected(request: fastapi.Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass


def _response(result: Result) -> JSONResponse:
  return JSONResponse(
    {
      "created": int(time.time()),
      "data": [
        {"b64_json": base64.b64encode(png).decode("ascii")}
        for png in result.pngs
      ],
      "output_format": "png",
      "seed": result.seed,
      "warnings": list(result.warnings),
    }
  )


async def _on_error(
  request: fastapi.Request, error: Exception
) -> fastapi.Response:
  """Says an error in the API's shape."""
  told = _told(error)
  if told.status == 500:
    logging.error("%s failed", request.url.path, exc_info=error)
  return _error_response(told)


def _error_response(told: _ApiError) -> fastapi.Response:
  return JSONResponse(
    {
      "error": {
        "message": str(told),
        "type": told.kind,
        "param": told.param,
        "code": told.code,
      }
    },
    told.status,
    dict(told.headers or {}),
  )


def _told(error: Exception) -> _ApiError:
  message = str(error)
  match error:
    case _ApiError():
      return error
    case errors.InvalidRequestError():
      param = _PARAMS.get(error.field, error.field)
      told = error.told(_NAMES)
      return _ApiError(400, told, param=param, code="invalid_value")
    case bodies.BodyError():
      # What is left of the body is not worth reading.
      close = {"Connection": "close"}
      return _ApiError(error.status, message, headers=close)
    case errors.BusyError():
      return _ApiError(
        429,
        message,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(error.retry_after)},
      )
    case errors.ClosedError():
      return _ApiError(503, message, kind="server_error", code="shutting_down")
    case errors.CancelledError():
      return _ApiError(499, message, code="cancelled")
    case errors.JobError():
      return _ApiError(500, message, kind="server_error")
    case exceptions.HTTPException():
      return _ApiError(
        error.status_code, str(error.detail), headers=error.headers
      )
    case _:
      return _ApiError(
        500,
        "Something went wrong; the server's log says what.",
        kind="server_error",
      )
