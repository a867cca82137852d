"""Makes latents and text states of a source once, for all training runs.

python -m sana_jax.precompute --source=DIR --checkpoint=DIR --output=DIR

--source is what training reads: a folder of pictures and texts, tar files and
so on. --output gets ArrayRecord shards and, when all are there, manifest.json.
The same command run again makes only what is missing; SIGTERM ends it after the
shard at hand. Machines share the work by --num_hosts and --host_index, and may
come and go: the shards are the same. --check=N decodes N pictures again and
reports how close they are, and warns where the autoencoder does not know such
pictures.

Exit codes: 0 all is made, or SIGTERM came; 1 something is wrong, as said; 3
some pictures cannot be used (each is named), the others are made.
"""

import os
import sys
import time
import warnings
from typing import NoReturn

import jax
from absl import app, flags, logging

from sana_jax import compilation_cache, devices, storage
from sana_jax.data import cache
from sana_jax.precompute import finalise, job, report, task

_OUTPUT = flags.DEFINE_string("output", None, "Of the cache.", required=True)
_NUM_HOSTS = flags.DEFINE_integer(
  "num_hosts", None, "Machines that share the work; None: what JAX says."
)
_HOST_INDEX = flags.DEFINE_integer(
  "host_index", None, "Number of this machine, from 0; None: what JAX says."
)
_CHECK = flags.DEFINE_integer(
  "check",
  None,
  "Pictures to decode again when all is made, for report.json; None: 8, unless "
  "that was done; 0: none.",
)
_FEW = 8
_CACHE = compilation_cache.define_flag()


def main(argv: list[str]) -> int:
  started = time.monotonic()
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  logging.set_verbosity(logging.INFO)
  warnings.showwarning = _log_warning
  compilation_cache.enable(_CACHE.value, os.environ)
  try:
    devices.check()
    return run(started)
  except (ValueError, OSError, FloatingPointError) as error:
    _fail(_text(error))
  except KeyboardInterrupt:
    _fail("Interrupted; the same command goes on from here.")
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    _fail(
      "Out of device memory; lower --batch_size or --vae_tile, or use "
      "--dtype=bfloat16."
    )


def run(started: float) -> int:
  """Makes what the flags ask for; returns the exit code.

  Args:
    started: when the program began, by time.monotonic.
  """
  num_hosts, host_index = _NUM_HOSTS.value, _HOST_INDEX.value
  if (num_hosts is None) != (host_index is None):
    raise ValueError("--num_hosts and --host_index go together; give both.")
  if num_hosts is None:
    num_hosts, host_index = jax.process_count(), jax.process_index()
  if _CHECK.value is not None and _CHECK.value < 0:
    raise ValueError(f"--check must not be negative, got {_CHECK.value}.")
  output = task.output_directory(_OUTPUT.value)
  prepared = job.prepare(task.of_flags())
  outcome = job.run(
    prepared,
    output,
    num_hosts=num_hosts,
    host_index=host_index,
    started=started,
  )
  if outcome.completed is not None:
    directory = storage.Directory(output, host_index)
    _report(prepared, outcome.completed, directory)
  return 3 if outcome.skipped else 0


def _report(
  prepared: job.Prepared,
  completed: finalise.Completed,
  directory: storage.Directory,
) -> None:
  compared = []
  count = _CHECK.value
  if count is None:
    count = 0 if report.is_compared(directory.path) else _FEW
  if count and completed.manifest.records:
    compared = report.compare(
      prepared.maker,
      cache.CachedSource(directory.path),
      completed.finished,
      count,
    )
    for each in sorted(compared, key=lambda each: each.psnr)[:3]:
      logging.info("among the worst: %s, %.1f dB", each.key, each.psnr)
  # What an earlier --check measured stays.
  if compared or not (directory.path / report.REPORT).exists():
    report.write(directory, completed.manifest, compared)
  if trouble := report.verdict(compared, completed.manifest.checkpoint):
    sys.stderr.write(f"precompute: WARNING: {trouble}\n")


def _text(error: Exception) -> str:
  # Of an OSError of ours, the number in front says nothing more.
  text = error.strerror if isinstance(error, OSError) else None
  if text is None or error.filename is not None:
    text = str(error)
  return " ".join(text.split())


def _log_warning(message, *_args, **_kwargs) -> None:
  logging.warning("%s", message)


def _fail(message: str) -> NoReturn:
  sys.stderr.write(f"precompute: {message}\n")
  sys.exit(1)


if __name__ == "__main__":
  task.define_flags()
  flags.adopt_module_key_flags(task)  # for --help
  app.run(main)
