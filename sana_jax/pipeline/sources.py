"""What a user may name as a checkpoint, and how it is recognised."""

import dataclasses
import re
from collections.abc import Collection

from etils import epath

from sana_jax.weights import files, hub, zoo

INDEX = "model_index.json"
# Kinds of pipeline that a directory may be saved as: is it SANA-Sprint?
PIPELINE_CLASSES = {
  "SanaPipeline": False,
  "SanaPAGPipeline": False,
  "SanaControlNetPipeline": False,
  "SanaSprintPipeline": True,
  "SanaSprintImg2ImgPipeline": True,
}
_ACCEPTED = (
  "a directory in the layout of diffusers, an original .pth or .safetensors "
  "file (with components=...), a work directory of train.py, the name of a "
  'published checkpoint, or "owner/name" of a repository on the hub'
)
_WEIGHT_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclasses.dataclass(frozen=True)
class Directory:
  """A whole checkpoint in the layout of diffusers.

  Attributes:
    entry: what the table of published checkpoints says; None: not in it.
  """

  path: epath.Path
  entry: zoo.Entry | None
  is_sprint: bool


@dataclasses.dataclass(frozen=True)
class TransformerWeights:
  """A transformer alone: an original file, or a `transformer/` directory."""

  path: epath.Path
  entry: zoo.Entry | None


@dataclasses.dataclass(frozen=True)
class TrainingRun:
  """A work directory of train.py."""

  path: epath.Path


Source = Directory | TransformerWeights | TrainingRun


def resolve(
  path: epath.PathLike,
  *,
  components: Collection[str] | None = None,
  variant: str | None = None,
  cache_dir: epath.PathLike | None = None,
  endpoint: str | None = None,
) -> Source:
  """Recognises a checkpoint, downloading it if it is no local path.

  Args:
    components: to download, see `hub.download`.
    variant: to download.
    cache_dir: of the hub's library, see `hub.download`, as `endpoint`.

  Raises:
    FileNotFoundError: it is none of what is accepted, or not to be had.
    ValueError: it is a directory or file of another kind.
  """
  local = epath.Path(path)
  if local.is_dir():
    return _directory(local)
  if local.is_file():
    if local.suffix not in _WEIGHT_SUFFIXES:
      raise ValueError(
        f"{path} has the suffix {local.suffix!r}; expected {_ACCEPTED}."
      )
    return TransformerWeights(local, zoo.lookup(str(path)))
  name = str(path)
  entry = zoo.lookup(name) if "://" not in name else None
  is_repo = _REPO.fullmatch(name) and not local.parent.exists()
  is_name = entry is not None and len(local.parts) == 1
  # Of a file, or beside what exists, it is a slip, whatever it is called.
  if not (is_repo or is_name) or local.suffix in _WEIGHT_SUFFIXES:
    raise FileNotFoundError(
      f"{path} does not exist; expected {_ACCEPTED}. Of the published ones: "
      f"{zoo.suggestion(name)}"
    )
  try:
    downloaded = hub.download(
      _repository(name, entry),
      components=components,
      variant=variant,
      cache_dir=cache_dir,
      endpoint=endpoint,
    )
  except FileNotFoundError as error:
    raise FileNotFoundError(
      f"{path} is no local path, and not to be had from the hub: {error} "
      f"Expected {_ACCEPTED}."
    ) from error
  return _directory(downloaded, entry)


def resolve_controlnet(
  path: epath.PathLike,
  *,
  cache_dir: epath.PathLike | None = None,
  endpoint: str | None = None,
) -> epath.Path:
  """Returns the directory or file of a ControlNet, downloaded if need be.

  Args:
    path: a local path, or the name of a published ControlNet.

  Raises:
    FileNotFoundError: it is neither.
  """
  local = epath.Path(path)
  if local.exists():
    return local
  published = zoo.lookup_controlnet(str(path))
  if published is None:
    raise FileNotFoundError(
      f"{path} does not exist; expected a directory in the layout of "
      "diffusers, an original .pth or .safetensors file, or one of "
      f"{', '.join(c.repo.partition('/')[2] for c in zoo.CONTROLNETS)}."
    )
  return hub.download_file(
    published.repo, published.file, cache_dir=cache_dir, endpoint=endpoint
  )


def _repository(name: str, entry: zoo.Entry | None) -> str | zoo.Entry:
  """Returns what to download: of the authors' own names, the diffusers one."""
  if entry is None or ("/" in name and name not in entry.names):
    return name  # Somebody else's repository may have the same name.
  return entry


def read_class(path: epath.PathLike) -> bool:
  """Returns whether a model_index.json describes SANA-Sprint.

  Raises:
    ValueError: it describes something else altogether.
  """
  found = files.read_json(path).get("_class_name")
  if found not in PIPELINE_CLASSES:
    raise ValueError(
      f"{path} describes a {found}; supported are "
      f"{', '.join(PIPELINE_CLASSES)}."
    )
  return PIPELINE_CLASSES[found]


def _directory(path: epath.Path, entry: zoo.Entry | None = None) -> Source:
  entry = entry or zoo.lookup(str(path))
  if (path / INDEX).is_file():
    return Directory(path, entry, read_class(path / INDEX))
  has_config = (path / "config.json").is_file()
  if has_config and (path / "checkpoints").is_dir():
    return TrainingRun(path)
  if has_config and "_class_name" in files.read_json(path / "config.json"):
    return TransformerWeights(path, entry or zoo.lookup(str(path.parent)))
  raise FileNotFoundError(
    f"{path} has no {INDEX}; expected {_ACCEPTED}. A work directory has "
    "config.json and checkpoints/."
  )
