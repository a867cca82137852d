"""Which files belong to which picture, by their names."""

import dataclasses
import pathlib
import posixpath
import re
from collections.abc import Iterable, Sequence

from sana_jax.data import storage

IMAGE_SUFFIXES = frozenset(
  (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif"),
    *(".bmp", ".dib", ".tif", ".tiff", ".avif", ".jp2", ".j2k", ".tga"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".qoi"),
  )
)
# Pictures to their owners, which nothing here decodes.
UNREAD_SUFFIXES = frozenset(
  (
    *(".jxl", ".heic", ".heif", ".svg", ".svgz", ".psd", ".psb", ".xcf"),
    *(".exr", ".hdr", ".eps", ".pdf", ".dng", ".cr2", ".cr3", ".nef", ".arw"),
    *(".orf", ".rw2", ".raf", ".raw", ".ico", ".avifs", ".jxr", ".bpg"),
  )
)
HIDDEN = "hidden"
_DESCRIBING = (".txt", ".json")
_SCORES = re.compile(r"[_.].*score$")


@dataclasses.dataclass(frozen=True)
class Group:
  """A picture's file and those that describe it.

  Attributes:
    key: of the record.
    text: its .txt file.
    captions: its .json files with captions, by what their names have beyond
      the picture's ("" for the one of the same name).
    scores: its .json files with scores.
  """

  key: str
  image: str
  text: str | None = None
  captions: tuple[tuple[str, str], ...] = ()
  scores: tuple[str, ...] = ()

  @property
  def stem(self) -> str:
    """The key in JSON files that are about several pictures."""
    return posixpath.basename(split_suffix(self.image)[0])


def is_image(name: str) -> bool:
  return split_suffix(name)[1].lower() in IMAGE_SUFFIXES


def unread(names: Iterable[str]) -> dict[str, str]:
  """Returns which files are pictures that are not read, and of what kind.

  The kind is the suffix, or `HIDDEN`. What macOS puts beside a picture
  (`._a.jpg`) is none.
  """
  kinds = {}
  for name in sorted(names):
    base = posixpath.basename(name)
    # A hidden ".jpg" has no suffix to posixpath.
    suffix = pathlib.PurePosixPath(f"x{base}").suffix.lower()
    if base.startswith("._"):
      continue
    if suffix in UNREAD_SUFFIXES:
      kinds[name] = suffix
    elif suffix in IMAGE_SUFFIXES and storage.is_hidden(name):
      kinds[name] = HIDDEN
  return kinds


def others(names: Iterable[str]) -> list[str]:
  """Returns the files that are neither pictures nor describe any."""
  return [
    name
    for name in sorted(names)
    if not is_image(name)
    and not storage.is_hidden(name)
    and split_suffix(name)[1].lower() not in {*UNREAD_SUFFIXES, *_DESCRIBING}
  ]


def split_suffix(name: str) -> tuple[str, str]:
  """Splits off the last suffix: a/b.c.jpg is a/b.c and .jpg."""
  return posixpath.splitext(name)


def is_score_file(name: str) -> bool:
  """Returns whether a .json file's name says that it holds scores."""
  stem, suffix = split_suffix(posixpath.basename(name))
  return suffix.lower() == ".json" and bool(_SCORES.search(stem))


def group(names: Sequence[str]) -> tuple[list[Group], list[str]]:
  """Groups files by their names without the last suffix.

  A picture's key is that name; where several pictures share it, theirs keep
  their suffixes.

  Args:
    names: with slashes, in any order.

  Returns:
    The groups, sorted by key, and the .txt and .json files of no picture, not
    even of one that is not read.
  """
  missed = {split_suffix(name)[0]: [name] for name in unread(names)}
  images: dict[str, list[str]] = {}
  for name in sorted(names):
    if is_image(name):
      images.setdefault(split_suffix(name)[0], []).append(name)
  texts: dict[str, str] = {}
  captions: dict[str, list[tuple[str, str]]] = {}
  scores: dict[str, list[str]] = {}
  orphans = []
  for name in sorted(names):
    stem, suffix = split_suffix(name)
    suffix = suffix.lower()
    if suffix not in _DESCRIBING:
      continue
    owner = stem if suffix == ".txt" else _owner(stem, images)
    if owner not in images:
      if stem not in missed and _owner(stem, missed) is None:
        orphans.append(name)
    elif suffix == ".txt":
      texts[stem] = name
    elif owner != stem and is_score_file(name):
      scores.setdefault(owner, []).append(name)
    else:
      captions.setdefault(owner, []).append((stem[len(owner) :], name))
  groups = [
    Group(
      key=stem if len(same) == 1 else image,
      image=image,
      text=texts.get(stem),
      captions=tuple(captions.get(stem, ())),
      scores=tuple(scores.get(stem, ())),
    )
    for stem, same in images.items()
    for image in same
  ]
  return sorted(groups, key=lambda g: g.key), orphans


def _owner(stem: str, images: dict[str, list[str]]) -> str | None:
  """Returns the longest picture's name that a .json file's begins with."""
  if stem in images:
    return stem
  # The reference's suffixes begin so: _InternVL2-26B, _prompt_clip_score.
  start = stem.rfind("/") + 1
  for position in range(len(stem) - 1, start, -1):
    if stem[position] == "_" and stem[:position] in images:
      return stem[:position]
  return None


def suffixes(names: Sequence[str]) -> dict[str, int]:
  """Counts files by suffix, the most frequent first."""
  counts: dict[str, int] = {}
  for name in names:
    suffix = pathlib.PurePosixPath(name).suffix.lower() or "no suffix"
    counts[suffix] = counts.get(suffix, 0) + 1
  return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
