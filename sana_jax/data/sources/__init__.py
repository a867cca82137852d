"""Opens whatever a user has on disk or in a bucket, as one schema."""

import importlib.resources
import re
from collections.abc import Callable, Sequence

from etils import epath

from sana_jax.data import storage
from sana_jax.data.sources import (
  access,
  array_record,
  folder,
  grouping,
  tfds,
  webdataset,
  wids,
)

KINDS = ("folder", "webdataset", "wids", "parquet", "tfds", "array_record")
_SUFFIXES = {
  "webdataset": ".tar",
  "parquet": ".parquet",
  "array_record": array_record.SUFFIX,
}
# As Hugging Face and TFDS name the files of splits.
_SHARD = re.compile(r"(?P<split>[\w.]+?)-\d+-of-\d+")


def emoji_path() -> str:
  """Returns where the bundled emoji are; splits "train" and "heldout"."""
  return str(importlib.resources.files("sana_jax.assets") / "emoji_64")


def open_source(
  path: epath.PathLike, *, kind: str = "auto", split: str | None = None
) -> access.FileSource:
  """Opens a data set of pictures with captions.

  Args:
    path: a directory, a file, or a pattern with stars or braces
      ({00..15}.tar), on a local disk or in any store that fsspec knows (gs://,
      s3://, hf://, memory://).
    kind: one of `KINDS`; "auto" looks at what is there.
    split: of a TFDS data set; for the others a subdirectory, or files named
      train.tar or train-....tar.

  Raises:
    FileNotFoundError: nothing is there, or nothing of the kind.
    ValueError: an unknown kind, files of several kinds, or files that are not
      what their names say.
  """
  if kind not in ("auto", *KINDS):
    raise ValueError(
      f"kind must be 'auto' or one of {', '.join(KINDS)}, got {kind!r}."
    )
  root = storage.Location.of(path)
  if root.is_dir():
    return _open_directory(root, kind, split)
  if root.is_file():
    if split is not None:
      raise ValueError(
        f"{root} is a file: split={split!r} needs a directory with splits."
      )
    return _open_files([root], root, kind)
  found = root.glob() if storage.is_pattern(root.path) else []
  if not found:
    raise FileNotFoundError(
      f"There is nothing at {root}: expected a directory of pictures, .tar, "
      ".parquet or .array_record files, or one such file."
    )
  if split is not None:
    found = [f for f in found if _is_of_split(f.name, split)]
  return _open_files(found, root, kind)


def _open_directory(
  root: storage.Location, kind: str, split: str | None
) -> access.FileSource:
  if kind == "tfds" or (
    kind == "auto"
    and (root / "dataset_info.json").is_file()
    and (root / "features.json").is_file()
  ):
    return tfds.TfdsSource(root, split)
  if kind == "wids" or (kind == "auto" and (root / wids.FILE_NAME).is_file()):
    if split is not None:
      root = root / split
    return wids.open_wids(root)
  everything = root.files()
  names = [name for name in everything if not storage.is_hidden(name)]
  if split is not None:
    everything = [name for name in everything if _is_of_split(name, split)]
    names = _of_split(names, root, split)
  kind = _kind_of(names, root) if kind == "auto" else kind
  if kind == "folder":
    return folder.FolderSource(root, everything)
  chosen = [n for n in names if n.lower().endswith(_SUFFIXES[kind])]
  if not chosen:
    raise FileNotFoundError(
      f"No {_SUFFIXES[kind]} files in {root}: there are "
      f"{grouping.suffixes(names) or 'no files'}."
    )
  _require_one_split(chosen, root, split)
  return _OPENERS[kind]([root / name for name in chosen], str(root))


def _open_files(
  files: Sequence[storage.Location], root: storage.Location, kind: str
) -> access.FileSource:
  names = [file.name for file in files]
  if kind == "wids" or (kind == "auto" and names == [wids.FILE_NAME]):
    return wids.open_wids(files[0])
  kind = _kind_of(names, root) if kind == "auto" else kind
  if kind not in _OPENERS:
    raise ValueError(
      f"{root} is no directory: expected one for kind {kind!r}, or .tar, "
      ".parquet or .array_record files."
    )
  return _OPENERS[kind](files, str(root))


def _kind_of(names: Sequence[str], root: storage.Location) -> str:
  """Returns the one kind of source that files with these names are."""
  kinds = {
    kind
    for kind, suffix in _SUFFIXES.items()
    if any(name.lower().endswith(suffix) for name in names)
  }
  if any(map(grouping.is_image, names)):
    kinds.add("folder")
  if len(kinds) == 1:
    return kinds.pop()
  there = grouping.suffixes(names) or "no files"
  if kinds:
    raise ValueError(
      f"{root} may be any of {', '.join(sorted(kinds))}: there are {there}. "
      "Pass kind, or a directory of one kind."
    )
  nested = [name for name in names if name.endswith("/dataset_info.json")]
  if nested:
    raise ValueError(
      f"{root} holds TFDS data sets further down: pass the directory of one, "
      f"such as {root / nested[0].rpartition('/')[0]}."
    )
  raise FileNotFoundError(
    f"No data set in {root}: expected pictures, .tar, .parquet or "
    f".array_record files, {wids.FILE_NAME}, or a TFDS dataset_info.json; "
    f"there are {there}."
  )


def _is_of_split(name: str, split: str) -> bool:
  base = name.rpartition("/")[2]
  return (
    name.startswith(f"{split}/")
    or base.startswith(f"{split}-")
    or base.partition(".")[0] == split
  )


def _of_split(
  names: Sequence[str], root: storage.Location, split: str
) -> list[str]:
  chosen = [name for name in names if _is_of_split(name, split)]
  if not chosen:
    raise ValueError(
      f"{root} has no split {split!r}: expected a subdirectory of that name, "
      f"or files that begin with it, such as {split}-00000-of-00001.parquet; "
      f"there are {list(names[:5])}."
    )
  return chosen


def _require_one_split(
  names: Sequence[str], root: storage.Location, split: str | None
) -> None:
  matches = [_SHARD.match(name.rpartition("/")[2]) for name in names]
  splits = sorted({match["split"] for match in matches if match})
  if split is None and len(splits) > 1 and all(matches):
    raise ValueError(
      f"{root} has the splits {', '.join(splits)}: pass one as split."
    )


def _parquet(files: Sequence[storage.Location], name: str) -> access.FileSource:
  # Importing pyarrow starts threads, and takes time.
  from sana_jax.data.sources import parquet  # noqa: PLC0415

  return parquet.ParquetSource(files, name)


_OPENERS: dict[
  str,
  Callable[[Sequence[storage.Location], str], access.FileSource],
] = {
  "webdataset": webdataset.TarSource,
  "parquet": _parquet,
  "array_record": array_record.ArrayRecordSource,
}
