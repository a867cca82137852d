"""A web page and an endpoint: python -m sana_jax.app [--checkpoint=DIR].

Without --checkpoint, the small emoji model that comes with the package. The
page is at http://127.0.0.1:7860, and beside it the OpenAI images API at /v1.
SIGTERM and SIGINT admit nothing more, make what waits within --grace_seconds,
refuse the rest with a message, and end with exit code 0. While the model is
loaded they end the process at once, with 143 and 130.
"""

import logging as std_logging
import os
import re
import socket
import sys
import warnings
from concurrent import futures

from absl import app, flags, logging
from etils import epath

from sana_jax import checkpoint as checkpoint_lib
from sana_jax import compilation_cache, devices, termination
from sana_jax import pipeline as pipeline_lib
from sana_jax.app import hosts
from sana_jax.app.limits import Limits
from sana_jax.app.service import Service
from sana_jax.bulk import loading, loading_flags, metadata, weight_files
from sana_jax.pipeline import sources

try:
  from sana_jax.app import server as server_lib
except ModuleNotFoundError as error:
  sys.exit(f"sana_jax.app needs {error.name}: pip install 'sana_jax[ui]'.")

_LONGEST_GRACE = 86400
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Directory, file, training run, or name on the hub."
)
_HOST = flags.DEFINE_string(
  "host", "127.0.0.1", "Address to listen at; 0.0.0.0: all of this machine."
)
_PORT = flags.DEFINE_integer(
  "port", 7860, "0: any that is free.", lower_bound=0, upper_bound=65535
)
_ALLOWED_HOSTS = flags.DEFINE_multi_string(
  "allowed_host",
  [],
  "A name that the server may be asked for by, besides localhost and its "
  "addresses, without a port; repeatable. None: any, but at the loopback "
  "address none.",
)
_PAGE = flags.DEFINE_boolean("page", True, "Serve the page, not only the API.")
_API_KEY = flags.DEFINE_string(
  "api_key",
  None,
  "What clients of the API must send; None: the environment's "
  "SANA_JAX_API_KEY, and without it nothing.",
)
_LORA = flags.DEFINE_multi_string(
  "lora", [], "An adapter that requests may name, as NAME=PATH; repeatable."
)
_WARM_UP = flags.DEFINE_boolean(
  "warm_up", True, "Compile before the first request; previews need it."
)
_GRACE = flags.DEFINE_float(
  "grace_seconds", 30.0, "For requests that wait when the server is to end."
)
# A bound of the flag's own would let NaN pass.
flags.register_validator(
  _GRACE,
  lambda seconds: 0 <= seconds <= _LONGEST_GRACE,
  f"Expected seconds, from 0 to {_LONGEST_GRACE}.",
)
_CACHE = compilation_cache.define_flag()
_LOADING = loading_flags.define()
_USUAL = Limits()
_LIMITS = {
  "max_images": flags.DEFINE_integer(
    "max_images", _USUAL.max_images, "Of one request."
  ),
  "max_pixels": flags.DEFINE_integer(
    "max_pixels",
    _USUAL.max_pixels,
    "Of one image; None: twice those it was trained at.",
  ),
  "max_prompt_characters": flags.DEFINE_integer(
    "max_prompt_characters",
    _USUAL.max_prompt_characters,
    "Of the prompt, and of the negative prompt.",
  ),
  "max_steps": flags.DEFINE_integer(
    "max_steps", _USUAL.max_steps, "Of one request."
  ),
  "max_upload_bytes": flags.DEFINE_integer(
    "max_upload_bytes", _USUAL.max_upload_bytes, "Of one picture."
  ),
  "max_upload_pixels": flags.DEFINE_integer(
    "max_upload_pixels", _USUAL.max_upload_pixels, "Of one picture."
  ),
  "max_waiting": flags.DEFINE_integer(
    "max_waiting", _USUAL.max_waiting, "Requests."
  ),
  "max_waiting_per_client": flags.DEFINE_integer(
    "max_waiting_per_client",
    _USUAL.max_waiting_per_client,
    "Requests from one address.",
  ),
}


def main(argv: list[str]) -> int:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  # Until the server has handlers of its own.
  with termination.ending_at_once("sana_jax.app"):
    return run()


def run() -> int:
  """Loads the model and serves it; returns the exit code."""
  logging.set_verbosity(logging.INFO)
  # Backends that are not there are no news.
  std_logging.getLogger("jax").setLevel(std_logging.WARNING)
  warnings.showwarning = _log_warning
  checkpoint_lib.quiet_orbax()
  compilation_cache.enable(_CACHE.value, os.environ)
  api_key = _API_KEY.value or os.environ.get("SANA_JAX_API_KEY") or None
  try:
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
      raise ValueError(
        "The API key has characters that no header can have; use letters, "
        "digits and signs of ASCII."
      )
    for name in _ALLOWED_HOSTS.value:
      hosts.check_name(name)
    sockets = server_lib.bind(_HOST.value, _PORT.value)
    devices.check()
    service = make_service()
  except (ValueError, OSError, ImportError) as error:
    sys.stderr.write(f"sana_jax.app: {' '.join(str(error).split())}\n")
    return 1
  return serve(service, api_key, sockets)


def make_service() -> Service:
  """Loads what the flags say.

  Raises:
    OSError: something is missing.
    ValueError: something is unreadable, does not fit, or cannot be.
  """
  try:
    limits = Limits(**{name: flag.value for name, flag in _LIMITS.items()})
  except ValueError as error:
    raise ValueError(f"--{error}") from error  # it begins with the name
  adapters = named_paths(_LORA.value)
  how = loading.Loading(**{n: f.value for n, f in _LOADING.items()})
  checkpoint = (
    pipeline_lib.bundled_checkpoint()
    if _CHECKPOINT.value is None
    else epath.Path(_CHECKPOINT.value)
  )
  source = sources.resolve(checkpoint, variant=how.variant)
  with futures.ThreadPoolExecutor(1) as background:
    # Reading the files twice costs little while loading computes.
    hashes = background.submit(weight_files.hashes, source, how)
    pipe = loading.load(checkpoint, how)
  made_with = metadata.describe_run(
    pipe, checkpoint, hashes.result(), how.describe()
  )
  return Service(
    pipe, limits, loras=adapters, made_with=made_with, warm_up=_WARM_UP.value
  )


def serve(
  service: Service, api_key: str | None, sockets: list[socket.socket]
) -> int:
  """Listens until a signal comes; returns the exit code."""
  names = None
  is_private = hosts.is_loopback(_HOST.value)
  if is_private or _ALLOWED_HOSTS.value:
    names = [*hosts.LOOPBACK, _HOST.value, *_ALLOWED_HOSTS.value]
  if not is_private:
    logging.warning(
      "listening at %s: whoever reaches this machine can use it%s; put a proxy "
      "with TLS and a login in front of it",
      _HOST.value,
      "" if api_key is None else " (the page; the API has its key)",
    )
  http = server_lib.make_app(
    service, api_key=api_key, with_page=_PAGE.value, host_names=names
  )
  server = server_lib.Server(http, service, grace_seconds=_GRACE.value)
  try:
    server.run(sockets)
  finally:
    # If it could not listen. What hangs has been waited for once.
    if server.ended_cleanly:
      service.close()
  logging.info("ended")
  logging.flush()
  if not server.ended_cleanly:
    # A compilation is under way, which only the end of the process ends.
    os._exit(0)
  return 0 if server.started else 1


def named_paths(texts: list[str]) -> dict[str, str]:
  """Reads values of --lora.

  Raises:
    ValueError: one is not NAME=PATH, or a name comes twice or is "none".
  """
  found: dict[str, str] = {}
  for text in texts:
    name, _, path = text.partition("=")
    # The page has "none" for itself.
    if not name or not path or name in found or name == "none":
      raise ValueError(
        f"--lora={text}: expected NAME=PATH, with a name of its own, which is "
        "not 'none'."
      )
    found[name] = path
  return found


def _log_warning(message, *_args, **_kwargs) -> None:
  logging.warning("%s", message)


if __name__ == "__main__":
  app.run(main)
