"""Builds the emoji data set of `sana_jax.data.emoji`.

On Debian:

  apt-get install fonts-noto-color-emoji unicode-data
  npm install emojilib
  python -m sana_jax.data.emoji_build --output_dir=/tmp/emoji_64
"""

import dataclasses
import importlib.resources
import io
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tensorflow_datasets as tfds
from absl import app, flags
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIZE = 64
_LEVELS = 20

# The only size of the font's bitmaps, and the square that holds them: the
# drawing is 128 pixels high and wide, which leaves a margin of 4.
_FONT_SIZE = 109
_GLYPH_SIZE = 136

GENDERS = ("person", "man", "woman")
SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")
OCCUPATIONS = (
  "health worker",
  "student",
  "teacher",
  "judge",
  "farmer",
  "cook",
  "mechanic",
  "factory worker",
  "office worker",
  "scientist",
  "technologist",
  "singer",
  "artist",
  "pilot",
  "astronaut",
  "firefighter",
  "police officer",
  "detective",
  "guard",
  "construction worker",
)
_HELDOUT_PER_OCCUPATION = 4

_LINE = re.compile(
  r"(?P<codepoints>[0-9A-F ]+?)\s*; fully-qualified\s*"
  r"# \S+ E[\d.]+ (?P<name>.+)"
)
_VARIATION_SELECTOR = "\ufe0f"

Render = Callable[[str], UInt8[np.ndarray, "64 64 3"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Emoji:
  """A line of the Unicode list, with its keywords."""

  text: str
  name: str
  base_name: str
  keywords: tuple[str, ...]
  group: str
  subgroup: str

  @property
  def codepoints(self) -> str:
    return " ".join(f"{ord(character):04X}" for character in self.text)


def base_name(name: str, names: frozenset[str]) -> str:
  """Drops the skin tones of a CLDR short name.

  Couples of two different tones are named `kiss: person, person, ...`, but
  their toneless form is `kiss`: a qualifier that no toneless emoji has is
  dropped too.

  Args:
    name: CLDR short name.
    names: Every name of the list.
  """
  head, separator, qualifiers = name.partition(": ")
  kept = [q for q in qualifiers.split(", ") if not q.endswith("skin tone")]
  toneless = head + separator + ", ".join(kept) if separator and kept else head
  return toneless if toneless in names else head


def heldout_names() -> frozenset[str]:
  """Names of the 80 held-out compositions, four per occupation.

  Occupation i loses the pairs (gender k mod 3, tone k mod 5) with
  k = i, i + 4, i + 8, i + 12. Its four tones differ, so it keeps two genders
  or more in every tone and three tones or more in every gender; a pair is lost
  to at most six of the twenty occupations.
  """
  names = set()
  for i, occupation in enumerate(OCCUPATIONS):
    for k in range(i, i + 4 * _HELDOUT_PER_OCCUPATION, 4):
      gender, tone = GENDERS[k % 3], SKIN_TONES[k % 5]
      person = occupation if gender == "person" else f"{gender} {occupation}"
      names.add(f"{person}: {tone} skin tone")
  return frozenset(names)


def read_keywords(path: str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
  """Reads emojilib's keywords by emoji, variation selectors removed."""
  table = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
  return {
    text.replace(_VARIATION_SELECTOR, ""): tuple(
      dict.fromkeys(word.replace("_", " ") for word in words)
    )
    for text, words in table.items()
  }


def read_emoji(
  emoji_test: str | os.PathLike[str], emojilib: str | os.PathLike[str]
) -> list[Emoji]:
  """Reads the fully-qualified emoji in CLDR order.

  Raises:
    FileNotFoundError: An input is missing; says what to install.
    ValueError: `emoji_test` lists no fully-qualified emoji.
  """
  _require(emoji_test, "emoji_test", "apt-get install unicode-data")
  _require(emojilib, "emojilib", "npm install emojilib")
  rows = list(_parse_emoji_test(emoji_test))
  if not rows:
    raise ValueError(
      f"{os.fspath(emoji_test)!r} lists no fully-qualified emoji: expected"
      " Unicode's emoji-test.txt"
    )
  keywords = read_keywords(emojilib)
  names = frozenset(row["name"] for row in rows)
  by_name = {
    row["name"]: keywords.get(row["text"].replace(_VARIATION_SELECTOR, ""), ())
    for row in rows
  }
  emoji = []
  for row in rows:
    base = base_name(row["name"], names)
    words = tuple(w for w in by_name[base] if _letters(w) != _letters(base))
    emoji.append(Emoji(**row, base_name=base, keywords=words))
  return emoji


def _letters(text: str) -> str:
  return re.sub(r"\W", "", text).lower()


def _parse_emoji_test(
  path: str | os.PathLike[str],
) -> Iterator[dict[str, str]]:
  group = subgroup = ""
  for line in pathlib.Path(path).read_text(encoding="utf-8").splitlines():
    if line.startswith("# group: "):
      group = line.removeprefix("# group: ")
    elif line.startswith("# subgroup: "):
      subgroup = line.removeprefix("# subgroup: ")
    elif match := _LINE.fullmatch(line):
      text = "".join(chr(int(c, 16)) for c in match["codepoints"].split())
      yield {
        "text": text,
        "name": match["name"],
        "group": group,
        "subgroup": subgroup,
      }


def font_renderer(font: str | os.PathLike[str]) -> Render:
  """Returns a function from an emoji to its picture on white.

  Raises:
    FileNotFoundError: The font is missing; says what to install.
  """
  _require(font, "font", "apt-get install fonts-noto-color-emoji")
  face = ImageFont.truetype(
    os.fspath(font), _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM
  )

  def render(text: str) -> UInt8[np.ndarray, "64 64 3"]:
    glyph = Image.new("RGBA", (_GLYPH_SIZE, _GLYPH_SIZE), (255, 255, 255, 0))
    ImageDraw.Draw(glyph).text((0, 4), text, font=face, embedded_color=True)
    # A sequence that the font lacks is laid out as its parts, side by side.
    if glyph.getbbox() is None or face.getlength(text) > _GLYPH_SIZE:
      raise ValueError(
        f"{os.fspath(font)!r} has no glyph for {text!r}: expected a Noto Color"
        " Emoji at least as recent as the emoji list"
      )
    picture = Image.new("RGBA", glyph.size, "white")
    picture.alpha_composite(glyph)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return np.array(
      picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    )

  return render


def encode_image(image: UInt8[np.ndarray, "64 64 3"]) -> bytes:
  """Encodes as lossless WebP of 20 levels per channel; white stays white.

  Measured on every 30th emoji: 40 dB at 40% of the size of 256 levels. Lossy
  WebP of that size reaches 32 dB: it halves the resolution of colour.
  """
  step = 255 / (_LEVELS - 1)
  reduced = np.round(np.round(image / step) * step).astype(np.uint8)
  buffer = io.BytesIO()
  # Higher quality or method saves 1% in twenty times the time.
  Image.fromarray(reduced).save(
    buffer, "WEBP", lossless=True, quality=75, method=4
  )
  return buffer.getvalue()


def _notice() -> str:
  assets = importlib.resources.files("sana_jax.assets")
  return (assets / "emoji_64" / "LICENSE").read_text(encoding="utf-8")


class EmojiBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Writes `emoji` as ArrayRecord, pictures drawn by `render`."""

  name = "emoji_64"
  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded. TFDS would look for checksums beside this module,
  # which fails where `sana_jax` is installed as an editable namespace package.
  url_infos = {}

  def __init__(
    self,
    emoji: Sequence[Emoji],
    render: Render,
    data_dir: str | os.PathLike[str],
  ):
    self._emoji = emoji
    self._render = render
    super().__init__(data_dir=data_dir, file_format="array_record")

  def _info(self) -> tfds.core.DatasetInfo:
    text = tfds.features.Text
    return tfds.core.DatasetInfo(
      builder=self,
      description="Emoji pictures with their names and keywords.",
      homepage="https://github.com/googlefonts/noto-emoji",
      license=_notice(),
      disable_shuffling=True,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(IMAGE_SIZE, IMAGE_SIZE, 3)),
          "name": text(),
          "base_name": text(),
          "keywords": tfds.features.Sequence(text()),
          "group": text(),
          "subgroup": text(),
          "codepoints": text(),
        }
      ),
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    del dl_manager  # Everything is on disk.
    heldout = heldout_names()
    return {
      "train": self._generate_examples(
        [e for e in self._emoji if e.name not in heldout]
      ),
      "heldout": self._generate_examples(
        [e for e in self._emoji if e.name in heldout]
      ),
    }

  def _generate_examples(self, emoji: Sequence[Emoji]):
    for index, e in enumerate(emoji):
      picture = encode_image(self._render(e.text))
      yield (
        index,
        {
          # Given an array, TFDS would encode it with TensorFlow.
          "image": io.BytesIO(picture),
          "name": e.name,
          "base_name": e.base_name,
          "keywords": list(e.keywords),
          "group": e.group,
          "subgroup": e.subgroup,
          "codepoints": e.codepoints,
        },
      )


def build(
  emoji: Sequence[Emoji], render: Render, output_dir: str | os.PathLike[str]
) -> None:
  """Writes the data set into `output_dir`, which must not hold one.

  Equal inputs give equal records in equal order. The files differ in bytes from
  process to process: protobuf serializes the fields of a record in any order.

  Raises:
    ValueError: `output_dir` holds a data set, or a split would be empty.
  """
  output = pathlib.Path(output_dir)
  if (output / "dataset_info.json").exists():
    raise ValueError(
      f"{os.fspath(output_dir)!r} already holds a data set: expected an empty"
      " or new directory; delete it first"
    )
  heldout = sum(e.name in heldout_names() for e in emoji)
  if not 0 < heldout < len(emoji):
    raise ValueError(
      f"{heldout} of {len(emoji)} emoji are held out: expected at least one in"
      " each split"
    )
  with tempfile.TemporaryDirectory() as directory:
    builder = EmojiBuilder(emoji, render, directory)
    builder.download_and_prepare()
    # TFDS nests name and version; the set is found by its directory alone.
    shutil.copytree(builder.data_dir, output, dirs_exist_ok=True)


def _require(path: str | os.PathLike[str], flag: str, command: str) -> None:
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(
      f"--{flag}: no file {os.fspath(path)!r}: install it with {command}, or"
      " pass its path"
    )


def define_flags() -> None:
  """Defines the flags of the command."""
  flags.DEFINE_string(
    "font",
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "Noto Color Emoji, in its bitmap (CBDT) form.",
  )
  flags.DEFINE_string(
    "emoji_test",
    "/usr/share/unicode/emoji/emoji-test.txt",
    "Unicode's list of emoji.",
  )
  flags.DEFINE_string(
    "emojilib",
    "node_modules/emojilib/dist/emoji-en-US.json",
    "Keywords of the npm package emojilib.",
  )
  flags.DEFINE_string("output_dir", None, "New directory.", required=True)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  values = flags.FLAGS
  try:
    build(
      read_emoji(values.emoji_test, values.emojilib),
      font_renderer(values.font),
      values.output_dir,
    )
  except (FileNotFoundError, ValueError) as error:
    sys.exit(f"emoji_build: {error}")


if __name__ == "__main__":
  define_flags()
  app.run(main)
