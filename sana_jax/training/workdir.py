"""A work directory belongs to one run."""

import json
import re
from typing import Any

import jax
from absl import logging
from etils import epath

from sana_jax import config as config_lib

# A run may be continued with other values of these; all else must stay.
_MAY_CHANGE = frozenset(
  {
    *("num_steps", "log_every"),
    *("sample_every", "sample_prompts", "sample_steps"),
    *("sample_guidance_scale", "remat"),
    *("scan_layers", "data.num_threads", "data.num_workers"),
    # Read once, when a run begins.
    "init_from",
    # The gradient is the same, up to rounding.
    "optim.accumulation",
    *("checkpoint.every", "checkpoint.keep", "checkpoint.keep_every"),
    *("checkpoint.keep_best", "checkpoint.best_metric"),
    "checkpoint.best_mode",
    *("anomalies.rollback_after", "anomalies.max_rollbacks"),
    *("anomalies.spike_factor", "anomalies.spike_window"),
    # Of earlier versions, which the fields of `checkpoint` replaced.
    *("checkpoint_every", "checkpoints_to_keep"),
    # See `sampler.BatchSampler` for what this changes.
    "data.sources.*.weight",
    # What they change in the data, `ledger.Ledger` sees.
    *("data.verify", "data.allow_changed"),
  }
)
# These may, too, with a warning: what is learned changes, what a checkpoint
# holds does not. They are the way out of a run that gave up.
_MAY_CHANGE_LEARNING = frozenset({"dtype", "optim.clip_norm", "optim.peak_lr"})


def claim(
  config: config_lib.TrainConfig, workdir: epath.Path, *, has_learned: bool
) -> None:
  """Writes config.json, or checks that the run there is this run.

  The first process says what is otherwise than it was.

  Args:
    has_learned: whether there is a checkpoint. A run that ended before its
      first leaves nothing to protect: its directory is taken over.

  Raises:
    ValueError: it is another; all differences are listed.
  """
  path = workdir / "config.json"
  is_there, warnings = path.exists(), []
  if is_there and has_learned:
    warnings = _compare(config, json.loads(path.read_text()), workdir)
  if jax.process_index() != 0:
    return
  if is_there and not has_learned:
    logging.info(
      "%s has no checkpoint: whatever run began there, this one begins anew",
      workdir,
    )
  for warning in warnings:
    logging.warning("%s", warning)
  # Renamed into place: neither another process nor a run that follows a killed
  # one sees half a file.
  partial = workdir / "config.json.partial"
  partial.write_text(config.to_json())
  partial.replace(path)


def _compare(
  config: config_lib.TrainConfig, before: dict[str, Any], workdir: epath.Path
) -> list[str]:
  """Returns what to warn of in a run that began with another config.

  Args:
    before: that config.

  Raises:
    ValueError: it is another run; all differences are listed.
  """
  ours = _flatten(json.loads(config.to_json()))
  # A run of an earlier version had what are the defaults of newer fields.
  theirs = _flatten(json.loads(type(config)().to_json())) | _flatten(before)
  changed = [
    name
    for name in sorted(ours.keys() | theirs.keys())
    if re.sub(r"\.\d+\.", ".*.", name) not in _MAY_CHANGE
    and not name.startswith(("hardware.", "mesh."))
    and ours.get(name) != theirs.get(name)
  ]
  differing = [
    f"{name} ({theirs.get(name)} there, {ours.get(name)} here)"
    for name in changed
    if name not in _MAY_CHANGE_LEARNING
  ]
  if differing:
    raise ValueError(
      f"{workdir} holds a run with another config; differing: "
      f"{', '.join(differing)}. Use another --workdir, or the same values."
    )
  warnings = [
    f"{name} was {theirs[name]}, now {ours[name]}: the run learns otherwise "
    "from here on"
    for name in changed
  ]
  steps = theirs["num_steps"]
  if steps != config.num_steps and config.optim.schedule == "cosine":
    warnings.append(
      f"num_steps was {steps}, now {config.num_steps}: the learning rate jumps "
      "to the cosine that ends there"
    )
  return warnings


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Turns nested dicts into one with names such as "optim.peak_lr".

  Dicts in lists are named by their place: "data.sources.0.path".
  """
  flat = {}
  for name, value in values.items():
    # An empty list is one of dicts, too, and has no names.
    if isinstance(value, list) and (not value or isinstance(value[0], dict)):
      value = {str(place): item for place, item in enumerate(value)}
    if isinstance(value, dict):
      flat |= _flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat
