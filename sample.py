"""Makes images: python sample.py --prompt="a red apple" [--checkpoint=DIR].

Without --checkpoint, the small emoji model that comes with the package. PNG
files carry everything needed to make them again (--reproduce=FILE).

--prompt_file takes any number: .txt with a prompt a line, or .jsonl, .csv or
.parquet with `prompt` and, if wanted, other fields named like the flags:
negative_prompt, seed, num_images_per_prompt, height, guidance_scale and so on.
The same command run again makes only what is missing; SIGTERM ends it after the
files at hand. Machines share the work by --num_hosts and --host_index, or by
--distributed.

Exit codes: 0 all is made, or SIGTERM came; 1 something is wrong, as said; 3
some lines or images are impossible (each is named), the others are made.
"""

import functools
import logging as std_logging
import os
import pathlib
import sys
import time
import warnings
from collections.abc import Mapping
from concurrent import futures
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from etils import epath
from jax.experimental import multihost_utils

from sana_jax import checkpoint as checkpoint_lib
from sana_jax import compilation_cache, devices
from sana_jax import pipeline as pipeline_lib
from sana_jax.bulk import (
  decodings,
  fields,
  inputs,
  job,
  loading,
  loading_flags,
  metadata,
  requests,
  runner,
  sinks,
  weight_files,
)
from sana_jax.pipeline import out_of_memory, sources

_PROMPT = flags.DEFINE_multi_string("prompt", [], "What to draw; repeatable.")
_PROMPT_FILE = flags.DEFINE_string(
  "prompt_file", None, "Prompts: .txt, .jsonl, .csv or .parquet."
)
_NEGATIVE = flags.DEFINE_string(
  "negative_prompt", "", "What to stay away from."
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Directory, file, training run, or name on the hub."
)
_SEED = flags.DEFINE_integer("seed", 0, "Same seed, same images.")
_COUNT = flags.DEFINE_integer("num_images_per_prompt", 1, "Images a prompt.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Images at a time.")
_OUTPUT_DIR = flags.DEFINE_string("output_dir", "outputs", "For all files.")
_FORMAT = flags.DEFINE_enum(
  "output_format", "png", sinks.FORMATS, "PNG files, or shards of many images."
)
_PER_SHARD = flags.DEFINE_integer("images_per_shard", 1000, "At most, a file.")
_NUM_HOSTS = flags.DEFINE_integer(
  "num_hosts", None, "Machines that share the work, without --distributed."
)
_HOST_INDEX = flags.DEFINE_integer(
  "host_index", None, "Number of this machine, from 0."
)
_DISTRIBUTED = flags.DEFINE_boolean(
  "distributed",
  False,
  "Share the work with the other processes of a TPU pod, Slurm job or Open MPI "
  "run; the command is the same for all.",
)
_GRID = flags.DEFINE_boolean("grid", False, "Write grid.png of all images too.")
_OVERWRITE = flags.DEFINE_boolean(
  "overwrite", False, "Remove the files of an earlier run, and start anew."
)
_BEST_OF = flags.DEFINE_integer(
  "best_of", None, "Make so many candidates of each image, keep the best."
)
_SCORER = flags.DEFINE_string(
  "scorer", None, '"module:function" of images and prompts, for --best_of.'
)
_REPRODUCE = flags.DEFINE_string(
  "reproduce", None, "Make the image of this PNG file again."
)
_CACHE = compilation_cache.define_flag()

# Flags that exclude each other.
_CUTS = {"vae_tile", "vae_window"}
# How the pipeline is loaded; PNG files say it, and --reproduce does the same.
_LOADING = loading_flags.define() | {
  "controlnet_wiring": flags.DEFINE_enum(
    "controlnet_wiring", None, ["diffusers", "original"], "How it is connected."
  ),
  "lora": flags.DEFINE_multi_string("lora", [], "An adapter; repeatable."),
  "lora_scale": flags.DEFINE_multi_float(
    "lora_scale", [], "For all adapters, or one for each."
  ),
  "fuse_lora": flags.DEFINE_boolean(
    "fuse_lora", False, "Add adapters to the weights: faster."
  ),
}
# Arguments of the pipeline's call.
_PICTURES = {
  "image": flags.DEFINE_string("image", None, "To begin with."),
  "mask_image": flags.DEFINE_string(
    "mask_image", None, "White where --image is made anew, black elsewhere."
  ),
  "control_image": flags.DEFINE_string(
    "control_image", None, "What the ControlNet follows, such as edges."
  ),
}
# Fields of GenerationConfig; None: the checkpoint's own value.
_SETTINGS = {
  "num_inference_steps": flags.DEFINE_integer(
    "num_inference_steps", None, "Calls of the transformer."
  ),
  "guidance_scale": flags.DEFINE_float(
    "guidance_scale", None, "1 and below: none."
  ),
  "guidance_interval": flags.DEFINE_string(
    "guidance_interval", None, '"low,high": guide at these noise levels only.'
  ),
  "height": flags.DEFINE_integer("height", None, "In pixels."),
  "width": flags.DEFINE_integer("width", None, "In pixels."),
  "aspect": flags.DEFINE_string(
    "aspect", None, 'Width to height, e.g. "16:9", in place of both.'
  ),
  "use_resolution_binning": flags.DEFINE_boolean(
    "use_resolution_binning", None, "Generate at the closest trained size."
  ),
  "pag_scale": flags.DEFINE_float(
    "pag_scale", None, "Of perturbed-attention guidance; 0: none."
  ),
  "pag_adaptive_scale": flags.DEFINE_float(
    "pag_adaptive_scale", None, "How much pag_scale falls with each timestep."
  ),
  "pag_applied_layers": flags.DEFINE_string(
    "pag_applied_layers", None, 'Blocks that are perturbed: "8" or "8,9".'
  ),
  "strength": flags.DEFINE_float(
    "strength", None, "How much of --image is made anew, in (0, 1]."
  ),
  "controlnet_conditioning_scale": flags.DEFINE_float(
    "controlnet_conditioning_scale", None, "Multiplies what a ControlNet adds."
  ),
}
# What an image of --reproduce says itself.
_REQUEST_FLAGS = (
  *("prompt", "prompt_file", "negative_prompt", "seed"),
  *("num_images_per_prompt", "batch_size"),
  *_PICTURES,
  *_SETTINGS,
)


def main(argv: list[str]) -> int:
  started = time.monotonic()
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  logging.set_verbosity(logging.INFO)
  # Backends that are not there are no news.
  std_logging.getLogger("jax").setLevel(std_logging.WARNING)
  warnings.showwarning = _log_warning
  checkpoint_lib.quiet_orbax()
  compilation_cache.enable(_CACHE.value, os.environ)
  try:
    check_flags()
    if _DISTRIBUTED.value:
      jax.distributed.initialize()
    devices.check()
    code = run(started)
    if _DISTRIBUTED.value:
      # The first to leave would take the others with it.
      multihost_utils.sync_global_devices("all images are made")
    return code
  except (ValueError, OSError, ImportError, FloatingPointError) as error:
    _fail(_text(error))
  except KeyboardInterrupt:
    _fail("Interrupted; the same command goes on from here.")
  except out_of_memory.OutOfMemoryError as error:
    _fail(error.text(flags=True))
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _fail("Out of device memory; lower --batch_size, or use --dtype=bfloat16.")


def run(started: float) -> int:
  """Makes what the flags ask for; returns the exit code.

  Args:
    started: when the program began, by time.monotonic.
  """
  again = read_reproduced()
  items = read_requests() if again is None else []
  chosen = selection()
  checkpoint = checkpoint_path()
  how = loading_options(again or {})
  source = sources.resolve(checkpoint, variant=how.variant)
  if again is not None:
    check_bundled(again, source)
  with futures.ThreadPoolExecutor(1) as background:
    # Reading the files twice costs little while loading computes.
    hashes = background.submit(weight_files.hashes, source, how)
    pipe = loading.load(checkpoint, how)
  made_with = how.describe()
  if chosen is not None:
    made_with |= {"best_of": _BEST_OF.value, "scorer": _SCORER.value}
  run_description = metadata.describe_run(
    pipe, checkpoint, hashes.result(), made_with
  )
  if again is not None:
    items = [metadata.request_again(pipe, _REPRODUCE.value, again)]
    metadata.prescribe_text_length(pipe, again)
    if not any(map(_is_given, _CUTS)):
      decodings.prescribe(pipe, again)
    for difference in [
      *metadata.differences(again, run_description),
      *inputs.changed(again),
    ]:
      logging.warning("the image may come out differently: %s", difference)
  items = requests.usable(
    items, functools.partial(runner.resolve_settings, pipe)
  )
  where = output()
  prepared = job.prepare(
    pipe,
    items,
    where,
    chosen,
    seed=_SEED.value,
    batch_size=_BATCH_SIZE.value if again is None else again["batch_size"],
    images_per_unit=1 if _FORMAT.value == "png" else _PER_SHARD.value,
  )
  if again is not None and not any(map(_is_given, _CUTS)):
    decodings.check_prescribed(prepared.decodings, prepared.images, again)
  problems = prepared.images.problems
  requests.report(problems, some_left=bool(prepared.images.requests))
  outcome = job.make(pipe, prepared, where, run_description, started, chosen)
  if outcome.stopped:
    return 0
  return 3 if problems or outcome.failed else 0


def check_flags() -> None:
  """Raises ValueError for flags that have no effect beside others."""
  if _DISTRIBUTED.value and (_is_given("num_hosts") or _is_given("host_index")):
    raise ValueError(
      "--distributed numbers the machines itself; leave --num_hosts and "
      "--host_index out."
    )
  if _FORMAT.value == "png" and _is_given("images_per_shard"):
    raise ValueError(
      "--images_per_shard has no effect on PNG files; leave it out, or choose "
      "--output_format=webdataset or arrayrecord."
    )


def read_reproduced() -> dict[str, Any] | None:
  """Returns what the image of --reproduce says about itself."""
  if _REPRODUCE.value is None:
    return None
  if useless := [f"--{name}" for name in _REQUEST_FLAGS if _is_given(name)]:
    raise ValueError(
      "--reproduce takes what it makes from the image; leave "
      f"{', '.join(useless)} out."
    )
  return metadata.read_png(_REPRODUCE.value)


def check_bundled(
  description: Mapping[str, Any], source: sources.Source
) -> None:
  """Raises ValueError for an image of another model, if none is named."""
  made_with = description.get("checkpoint_sha256")
  if _CHECKPOINT.value is not None or made_with is None:
    return
  bundled = weight_files.hashes(source, loading.Loading())
  if bundled["checkpoint_sha256"] != made_with:
    raise ValueError(
      f"{_REPRODUCE.value} was made with the checkpoint "
      f"{description.get('checkpoint')!r}, not with the model that comes with "
      "this package; give it as --checkpoint."
    )


def read_requests() -> list[requests.Item]:
  """Reads both flags: what can be made of them, and what cannot, in order.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a flag's value that cannot be, or an unreadable file.
  """
  reader = requests.Reader(
    negative_prompt=_NEGATIVE.value,
    count=_COUNT.value,
    settings=fields.from_flags({n: f.value for n, f in _SETTINGS.items()}),
    pictures={n: f.value for n, f in _PICTURES.items() if f.value is not None},
  )
  items: list[requests.Item] = []
  for number, prompt in enumerate(_PROMPT.value, 1):
    try:
      items.append(reader.make("--prompt", number, {"prompt": prompt}))
    except ValueError as error:
      raise ValueError(f"--prompt={prompt!r}: {error}.") from error
  if _PROMPT_FILE.value:
    items += reader.read(_PROMPT_FILE.value)
    if not items:
      raise ValueError(
        f"--prompt_file {_PROMPT_FILE.value} is empty; put a prompt on a line."
      )
  elif not items:
    raise ValueError("There is no prompt; give --prompt or --prompt_file.")
  return items


def loading_options(described: Mapping[str, Any]) -> loading.Loading:
  """Returns the flags that are given, and the image's values of others."""
  given = {name for name in _LOADING if _is_given(name)}
  if given & _CUTS:
    given |= _CUTS
  values = {
    name: described[name]
    if name in described and name not in given
    else flag.value
    for name, flag in _LOADING.items()
  }
  # JSON and flags have lists.
  return loading.Loading(
    **{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
  )


def checkpoint_path() -> epath.Path:
  """Returns --checkpoint, or the model that comes with the package."""
  if _CHECKPOINT.value is None:
    return pipeline_lib.bundled_checkpoint()
  return epath.Path(_CHECKPOINT.value)


def selection() -> runner.Selection | None:
  """Returns how the best of several candidates is found.

  Raises:
    ValueError: there is no such scorer, or a flag that cannot be.
  """
  if (_BEST_OF.value is None) != (_SCORER.value is None):
    raise ValueError("--best_of and --scorer go together; give both.")
  if _BEST_OF.value is None:
    return None
  if _BEST_OF.value < 1:
    raise ValueError(f"--best_of must be at least 1, got {_BEST_OF.value}.")
  if _REPRODUCE.value is not None:
    raise ValueError("--best_of cannot go with --reproduce.")
  return runner.Selection(_BEST_OF.value, runner.load_scorer(_SCORER.value))


def output() -> job.Output:
  """Returns where the images go."""
  num_hosts, host_index = _NUM_HOSTS.value, _HOST_INDEX.value
  if (num_hosts is None) != (host_index is None):
    raise ValueError("--num_hosts and --host_index go together; give both.")
  if num_hosts is None:
    num_hosts, host_index = jax.process_count(), jax.process_index()
  return job.Output(
    path=pathlib.Path(_OUTPUT_DIR.value),
    format=_FORMAT.value,
    grid=_GRID.value,
    overwrite=_OVERWRITE.value,
    num_hosts=num_hosts,
    host_index=host_index,
  )


def _is_given(name: str) -> bool:
  flag = flags.FLAGS[name]
  return bool(flag.present) or flag.value != flag.default


def _text(error: Exception) -> str:
  # Of an OSError of ours, the number in front says nothing more.
  text = error.strerror if isinstance(error, OSError) else None
  if text is None or error.filename is not None:
    text = str(error)
  return " ".join(text.split())


def _log_warning(message, *_args, **_kwargs) -> None:
  logging.warning("%s", message)


def _fail(message: str) -> NoReturn:
  sys.stderr.write(f"sample.py: {message}\n")
  sys.exit(1)


if __name__ == "__main__":
  app.run(main)
