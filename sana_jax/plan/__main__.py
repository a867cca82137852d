"""Plans a run: python -m sana_jax.plan --config=FILE --topology=v5e:16x16.

Compiles the step of the run for devices that need not be there and says what
memory it takes, what it sends, and how fast it can be. Fields of the config are
set as for train.py: --config.batch_size=512 --config.mesh.fsdp=16.
"""

import json
import sys
from typing import Any

import jax
from absl import app, flags
from etils import epath

from sana_jax import config as config_lib
from sana_jax import config_flag
from sana_jax.plan import report, sampling, topology, training

_CONFIG = config_flag.define()
_TOPOLOGY = flags.DEFINE_string(
  "topology", None, "Chips, such as v5e:16x16, v5p:4x4x4, v6e:8x8 or h100:8."
)
_NUM_SLICES = flags.DEFINE_integer(
  "num_slices", 1, "So many of them, with a slower network between.", 1
)
_WHAT = flags.DEFINE_enum(
  "what", "train", ["train", "sample"], "The step of training, or sampling."
)
_HEIGHT = flags.DEFINE_integer("height", None, "Pixels; default: as trained.")
_WIDTH = flags.DEFINE_integer("width", None, "Pixels; default: as trained.")
_EFFICIENCY = flags.DEFINE_float(
  "efficiency",
  0.5,
  "Share of the chip's peak that its products reach.",
  0.01,
  1,
)
_NUM_IMAGES = flags.DEFINE_float(
  "num_images", 1e6, "Images to train on, or to make.", 1
)
_IMAGES_PER_CHIP = flags.DEFINE_integer(
  "images_per_chip", 1, "Sampled at a time; every chip samples its own.", 1
)
_STEPS = flags.DEFINE_integer("steps", 20, "Of the sampler.", 1)
_JSON = flags.DEFINE_string("json", None, "File for the record of the plan.")
flags.mark_flags_as_required(["config", "topology"])

_parse_flags = config_flag.parser("plan")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"Unexpected arguments: {argv[1:]}.")
  # Devices that are here are of no use, and not to be taken.
  jax.config.update("jax_platforms", "cpu")
  try:
    _check_flags()
    text, record = make_plan(_CONFIG.value)
  except (ValueError, OSError, ModuleNotFoundError) as error:
    sys.exit(f"plan: {' '.join(str(error).split())}")
  sys.stdout.write(text + "\n")
  if _JSON.value:
    path = epath.Path(_JSON.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def _check_flags() -> None:
  idle = [
    f"--{flag.name}"
    for flag in (_IMAGES_PER_CHIP, _STEPS)
    if flag.present and _WHAT.value == "train"
  ]
  if idle:
    raise ValueError(
      f"{' and '.join(idle)}: only with --what=sample; the batch of a training "
      "step is --config.batch_size."
    )


def make_plan(config: config_lib.Config) -> tuple[str, dict[str, Any]]:
  """Plans what the flags ask for; returns a page to read, and a record."""
  training.check_config(config)
  devices = topology.describe(_TOPOLOGY.value, num_slices=_NUM_SLICES.value)
  given = flags.FLAGS["config"].override_values
  training.complete(config, devices, given)
  config.freeze()
  common = {
    "height": _HEIGHT.value,
    "width": _WIDTH.value,
    "efficiency": _EFFICIENCY.value,
    "num_images": _NUM_IMAGES.value,
  }
  if _WHAT.value == "train":
    plan = training.plan(config, devices, **common)
    return report.text(plan), report.record(plan)
  plan = sampling.plan(
    config,
    devices,
    images=_IMAGES_PER_CHIP.value,
    num_steps=_STEPS.value,
    **common,
  )
  return sampling.text(plan), sampling.record(plan)


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
