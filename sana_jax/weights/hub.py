"""Downloads checkpoints from the Hugging Face hub, or finds them cached."""

import contextlib
import errno
import importlib
import types
from collections.abc import Collection, Sequence
from typing import Any

from etils import epath

from sana_jax.weights import files, zoo

_COMPONENTS = ("transformer", "vae", "text_encoder")
# Only in repositories of pipelines that have one.
_OPTIONAL = ("controlnet",)
_SMALL = (
  "model_index.json",
  "generation_config.json",
  "scheduler/*.json",
  "tokenizer/*",
  *(f"{name}/config.json" for name in _COMPONENTS + _OPTIONAL),
)


def download(
  repo: str | zoo.Entry,
  *,
  components: Collection[str] | None = None,
  variant: str | None = None,
  revision: str | None = None,
  cache_dir: epath.PathLike | None = None,
  endpoint: str | None = None,
  token: str | None = None,
) -> epath.Path:
  """Returns the directory of a checkpoint in the diffusers layout.

  Only what loading needs is downloaded: configurations, tokenizer, and the
  safetensors weights of the variant asked for.

  Args:
    repo: "owner/name", or an entry of the table of published checkpoints.
    components: those whose weights are wanted, such as "vae"; None: all.
    variant: such as "fp16", for components that have it, the others are taken
      without one; None prefers weights without a variant.
    revision: branch, tag or commit; None: the newest.
    cache_dir: None: where the hub's library keeps its files.
    endpoint: address of the hub; None: the library's.
    token: of an account; None: that of `hf auth login`.

  Raises:
    ImportError: the hub's library is not installed.
    FileNotFoundError: no such repository, revision or variant, or no
      connection and nothing in the cache.
    PermissionError: the repository's licence must be accepted first.
    OSError: the disk is full, or the download failed otherwise.
  """
  hub, errors = _library()
  repo_id = _repo_id(repo)
  options = {
    "repo_id": repo_id,
    "revision": revision,
    "cache_dir": None if cache_dir is None else str(cache_dir),
    "endpoint": endpoint,
    "token": token,
  }
  with _explained(errors, repo_id, revision):
    path = hub.snapshot_download(**options, allow_patterns=list(_SMALL))
    try:
      listed = hub.snapshot_download(
        **options,
        allow_patterns=[
          f"{name}/*.safetensors*" for name in _COMPONENTS + _OPTIONAL
        ],
        dry_run=True,
      )
    except errors.DryRunError:
      # No connection, but a cache: loading says what it lacks, if anything.
      return epath.Path(path)
  listing = [file.filename for file in listed]
  names = _weights(listing, repo_id, variant, components)
  with _explained(errors, repo_id, revision):
    return epath.Path(hub.snapshot_download(**options, allow_patterns=names))


def download_file(
  repo_id: str,
  file: str,
  *,
  cache_dir: epath.PathLike | None = None,
  endpoint: str | None = None,
  token: str | None = None,
) -> epath.Path:
  """Returns one file of a repository, such as original weights.

  Arguments and errors are those of `download`.
  """
  hub, errors = _library()
  with _explained(errors, repo_id, None):
    return epath.Path(
      hub.hf_hub_download(
        repo_id,
        file,
        cache_dir=None if cache_dir is None else str(cache_dir),
        endpoint=endpoint,
        token=token,
      )
    )


@contextlib.contextmanager
def _explained(errors: Any, repo_id: str, revision: str | None):
  """Turns the library's errors into one line each, with the remedy."""
  try:
    yield
  except errors.GatedRepoError as error:
    raise PermissionError(
      f"{repo_id} is gated: accept its licence on the page of the model, then "
      "run `hf auth login` with a token of that account."
    ) from error
  except errors.RepositoryNotFoundError as error:
    raise FileNotFoundError(
      f"The hub has no repository {repo_id}, or it is private (then run `hf "
      f"auth login`); {zoo.suggestion(repo_id)}"
    ) from error
  except errors.RevisionNotFoundError as error:
    raise FileNotFoundError(
      f"{repo_id} has no revision {revision!r}; leave revision=None for the "
      "newest, or look at its branches and tags."
    ) from error
  except errors.EntryNotFoundError as error:
    if isinstance(error, errors.LocalEntryNotFoundError):
      raise _unreachable(repo_id, errors, error) from error
    raise FileNotFoundError(
      f"{repo_id} has no such file ({' '.join(str(error).split())})."
    ) from error
  except OSError as error:
    raise _failed(repo_id, error) from error


def _unreachable(repo_id: str, errors: Any, error: Any) -> OSError:
  if isinstance(error.__cause__, errors.HfHubHTTPError):
    return _failed(repo_id, error.__cause__)
  return FileNotFoundError(
    f"{repo_id} is not in the local cache and the hub cannot be reached; "
    f"download it elsewhere (`hf download {repo_id}`) and pass its directory."
  )


def _library() -> tuple[types.ModuleType, types.ModuleType]:
  try:
    return (
      importlib.import_module("huggingface_hub"),
      importlib.import_module("huggingface_hub.errors"),
    )
  except ImportError as error:
    raise ImportError(
      "Downloading needs the package huggingface_hub: pip install "
      "'sana_jax[hub]', or download the checkpoint elsewhere and pass its "
      "directory."
    ) from error


def _repo_id(repo: str | zoo.Entry) -> str:
  if isinstance(repo, str):
    return repo
  if repo.diffusers_repo is None:
    raise FileNotFoundError(
      f"{repo.name} is published in the original layout only; run `hf download "
      f"{repo.repo} {repo.file}` and pass the file, with components= the "
      "directory of another checkpoint."
    )
  return repo.diffusers_repo


def _weights(
  names: Sequence[str],
  repo_id: str,
  variant: str | None,
  wanted: Collection[str] | None,
) -> list[str]:
  """Chooses the files to download: those that loading will read."""
  chosen, found = [], set()
  for component in _COMPONENTS + _OPTIONAL:
    if wanted is not None and component not in wanted:
      continue
    prefix = f"{component}/"
    inside = [n.removeprefix(prefix) for n in names if n.startswith(prefix)]
    by_variant = files.group_by_variant(inside)
    found |= set(by_variant)
    if not by_variant and component in _OPTIONAL:
      continue
    if not by_variant:
      raise FileNotFoundError(
        f"{repo_id} has no safetensors weights in {component}/; expected a "
        "repository in the layout of diffusers."
      )
    which = variant if variant in by_variant else None
    if which not in by_variant and len(by_variant) > 1:
      raise FileNotFoundError(
        f"{repo_id} has {component} weights in the variants "
        f"{sorted(by_variant)} only; choose one with variant=..."
      )
    group = by_variant.get(which) or next(iter(by_variant.values()))
    chosen += [prefix + name for name in group]
  if variant is not None and variant not in found:
    raise FileNotFoundError(
      f"No component of {repo_id} has weights of variant {variant!r}, only "
      f"{sorted(v or 'no variant' for v in found)}."
    )
  return chosen


def _failed(repo_id: str, error: Any) -> OSError:
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    return OSError(
      error.errno,
      f"The disk is full: {repo_id} could not be downloaded; make room, or "
      "choose another cache_dir. What has arrived is kept.",
    )
  return OSError(
    f"Downloading {repo_id} failed ({' '.join(str(error).split())}); try "
    "again: what has arrived is kept."
  )
