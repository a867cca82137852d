"""What a run begins with when that is not random: another's parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from absl import logging
from etils import epath

from sana_jax import checkpoint
from sana_jax import config as config_lib
from sana_jax.pipeline import sources, training_run
from sana_jax.weights import components, mapping, opening

# No parameter depends on them: stages of one model differ in its size, and the
# positional embedding is computed.
_MAY_DIFFER = frozenset({"sample_size", "interpolation_scale"})


def prepare(
  config: config_lib.TextToImageConfig, abstract: dict[str, Any]
) -> Callable[[], dict[str, Any]]:
  """Checks what `config.init_from` names; returns what reads the parameters.

  Every device gets its part straight from the files.

  Args:
    abstract: shapes and shardings of the parameters that are trained.

  Raises:
    FileNotFoundError: it is not there, or lacks what is trained.
    ValueError: it is another model than `config.model`; names all differences.
  """
  wanted = [
    name for name in ("transformer", "text_encoder") if name in abstract
  ]
  path, step = _split(config.init_from)
  source = sources.resolve(path, components=wanted)
  if isinstance(source, sources.TrainingRun):
    return _prepare_run(source.path, step, config, abstract)
  logging.info("beginning with the parameters in %s", source.path)
  whole = isinstance(source, sources.Directory)
  if "text_encoder" in abstract and not whole:
    raise FileNotFoundError(
      f"init_from ({config.init_from}) is a transformer alone, but "
      "train_text_encoder=True; name a whole checkpoint."
    )
  found = {
    "transformer": _transformer(
      source.path / "transformer" if whole else source.path, config
    )
  }
  if "text_encoder" in abstract:
    path = source.path / "text_encoder"
    encoder = opening.open_text_encoder(path)
    _check(config.text_encoder, encoder.config, "text_encoder", path)
    found["text_encoder"] = encoder
  return lambda: {
    name: _fill(abstract[name], part) for name, part in found.items()
  }


def _transformer(
  path: epath.Path, config: config_lib.TextToImageConfig
) -> opening.Component:
  found = opening.open_transformer(path)
  _check(config.model, found.config, "model", path, but=_MAY_DIFFER)
  decision = components.trained_in_fp16(path, found)
  if decision.clamp != config.fp16_clamp:
    logging.warning(
      "%s: %s, but this run has fp16_clamp=%s",
      *(path, decision.reason, config.fp16_clamp),
    )
  return found


def _fill(abstract: Any, found: opening.Component) -> Any:
  return mapping.load(
    abstract,
    found.rules,
    found.tensors,
    shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    ignore=found.ignored,
    source=found.source,
  )


def _split(init_from: str) -> tuple[epath.PathLike, int | None]:
  """Splits WORKDIR/checkpoints/STEP; of all else, the step is None."""
  path = epath.Path(init_from)
  if path.parent.name == "checkpoints" and path.name.isdigit():
    return path.parent.parent, int(path.name)
  return init_from, None


def _prepare_run(
  workdir: epath.Path,
  named: int | None,
  config: config_lib.TextToImageConfig,
  abstract: dict[str, Any],
) -> Callable[[], dict[str, Any]]:
  before = training_run.read_config(workdir)
  _check_run(workdir, before, config)
  step = checkpoint.find_step(workdir, named)
  logging.info(
    "beginning with the %s of step %d of %d of the run in %s",
    "average" if before.ema_decay else "parameters",
    *(step, before.num_steps, workdir),
  )
  if named is None and step < before.num_steps:
    logging.warning(
      "the run in %s is not finished: what follows is taken from step %d of %d",
      *(workdir, step, before.num_steps),
    )
  return functools.partial(
    checkpoint.restore_average, workdir, abstract, step=step
  )


def _check_run(
  workdir: epath.Path,
  before: config_lib.TextToImageConfig,
  config: config_lib.TextToImageConfig,
) -> None:
  _check(config.model, before.model, "model", workdir, but=_MAY_DIFFER)
  if before.train_text_encoder != config.train_text_encoder:
    raise ValueError(
      f"init_from ({workdir}) has train_text_encoder="
      f"{before.train_text_encoder}, this run {config.train_text_encoder}: "
      f"name {workdir / 'export'}, which has both models."
    )


def _check(
  ours: config_lib.Config,
  theirs: config_lib.Config,
  name: str,
  source: epath.Path,
  *,
  but: frozenset[str] = frozenset(),
) -> None:
  mine, found = ours.to_dict(), theirs.to_dict()
  differing = [
    f"{name}.{field} ({found[field]} there, {mine[field]} in the config)"
    for field in mine
    if field not in but and found[field] != mine[field]
  ]
  if differing:
    raise ValueError(
      f"init_from ({source}) holds another model than this run trains: "
      f"{', '.join(differing)}."
    )
