"""The emoji data set: what ships, how it is built, how it is captioned."""

import hashlib
import json
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from sana_jax.data import emoji, emoji_build

FONT = pathlib.Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")

EMOJI_TEST = """\
# group: People & Body
# subgroup: person-role
1F9D1 200D 1F52C ; fully-qualified # x E12.1 scientist
1F469 200D 1F52C ; fully-qualified # x E4.0 woman scientist
1F469 1F3FD 200D 1F52C ; fully-qualified # x \
E4.0 woman scientist: medium skin tone
1F469 1F3FF 200D 1F52C ; fully-qualified # x \
E4.0 woman scientist: dark skin tone
# subgroup: family
1F48F ; fully-qualified # x E0.6 kiss
1F9D1 1F3FB 200D 2764 FE0F 200D 1F48B 200D 1F9D1 1F3FC ; fully-qualified # x \
E13.1 kiss: person, person, light skin tone, medium-light skin tone
# group: Symbols
# subgroup: keycap
0031 FE0F 20E3 ; fully-qualified # x E0.6 keycap: 1
0031 20E3 ; unqualified # x E0.6 keycap: 1
"""

EMOJILIB = {
  "\U0001f469\u200d\U0001f52c": ["woman_scientist", "lab_coat", "lab coat"],
  "1\ufe0f\u20e3": ["keycap_1", "one"],
}


def draw(text):
  """A picture that depends on every character of `text`."""
  seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
  rng = np.random.default_rng(seed)
  return rng.integers(256, size=(64, 64, 3), dtype=np.uint8)


@pytest.fixture(name="inputs")
def _inputs(tmp_path):
  emoji_test = tmp_path / "emoji-test.txt"
  emoji_test.write_text(EMOJI_TEST, encoding="utf-8")
  emojilib = tmp_path / "emoji-en-US.json"
  emojilib.write_text(json.dumps(EMOJILIB), encoding="utf-8")
  return emoji_test, emojilib


@pytest.fixture(name="entries")
def _entries(inputs):
  return emoji_build.read_emoji(*inputs)


@pytest.fixture(name="bundled", scope="module")
def _bundled():
  return {split: list(emoji.load(split)) for split in ("train", "heldout")}


def make_record(keywords):
  return emoji.Record(
    image=np.zeros((64, 64, 3), np.uint8),
    name="red apple",
    base_name="red apple",
    keywords=keywords,
    group="Food & Drink",
    subgroup="food-fruit",
    codepoints="1F34E",
  )


def test_the_bundled_set_is_complete_and_readable(bundled):
  records = bundled["train"] + bundled["heldout"]
  assert len(bundled["train"]) == 3575
  assert len(bundled["heldout"]) == 80
  assert len({record["name"] for record in records}) == 3655
  assert len({record["codepoints"] for record in records}) == 3655
  for record in records:
    assert record["image"].shape == (64, 64, 3)
    assert record["image"].dtype == np.uint8
    assert record["image"].std() > 0
    assert record["group"]
    assert record["subgroup"]
  # Bytes of the corners: almost every emoji leaves them white.
  corners = np.stack([record["image"][::63, ::63] for record in records])
  assert (corners == 255).mean() > 0.99


def test_the_bundled_set_takes_three_to_six_megabytes_with_its_licence():
  directory = pathlib.Path(emoji.__file__).parents[1] / "assets" / "emoji_64"
  size = sum(path.stat().st_size for path in directory.iterdir())
  assert 3e6 < size < 6e6
  notice = (directory / "LICENSE").read_text(encoding="utf-8")
  for word in ("Apache License", "SIL Open", "Unicode License V3", "Mu-An"):
    assert word in notice


def test_records_share_a_base_name_when_only_skin_tones_differ(bundled):
  records = bundled["train"] + bundled["heldout"]
  by_name = {record["name"]: record for record in records}
  toneless = {name for name in by_name if "skin tone" not in name}
  assert {record["base_name"] for record in records} == toneless
  for name in toneless:
    assert by_name[name]["base_name"] == name
  for record in records:
    base = by_name[record["base_name"]]
    assert record["keywords"] == base["keywords"]
    assert record["group"] == base["group"]
    assert not any("skin tone" in word for word in record["keywords"])


def test_every_part_of_a_heldout_composition_is_trained_in_other_ones(bundled):
  compositions = {
    f"{'' if gender == 'person' else gender + ' '}{occupation}: {tone} skin"
    " tone": (occupation, gender, tone)
    for occupation in emoji_build.OCCUPATIONS
    for gender in emoji_build.GENDERS
    for tone in emoji_build.SKIN_TONES
  }
  train = {
    compositions[record["name"]]
    for record in bundled["train"]
    if record["name"] in compositions
  }
  heldout = {compositions[record["name"]] for record in bundled["heldout"]}
  assert len(heldout) == 80
  assert len(train) == 300 - 80
  for occupation, gender, tone in heldout:
    same_person = {t for o, g, t in train if (o, g) == (occupation, gender)}
    same_look = {o for o, g, t in train if (g, t) == (gender, tone)}
    same_tone = {g for o, g, t in train if (o, t) == (occupation, tone)}
    assert len(same_person) >= 3
    assert len(same_look) >= 14
    assert len(same_tone) == 2
    assert tone not in same_person
  # The toneless form of every occupation is trained too.
  names = {record["name"] for record in bundled["train"]}
  assert {occupation for occupation, _, _ in heldout} <= names


def test_heldout_names_use_each_occupation_four_times_in_four_tones():
  names = emoji_build.heldout_names()
  assert len(names) == 80
  for occupation in emoji_build.OCCUPATIONS:
    tones = {
      tone
      for tone in emoji_build.SKIN_TONES
      for name in names
      if name.endswith(f"{occupation}: {tone} skin tone")
    }
    assert len(tones) == 4


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("woman firefighter: dark skin tone", "woman firefighter"),
    ("woman: light skin tone, red hair", "woman: red hair"),
    ("woman: red hair", "woman: red hair"),
    ("flag: France", "flag: France"),
    ("keycap: 1", "keycap: 1"),
    ("family: man, woman, boy", "family: man, woman, boy"),
    ("handshake: light skin tone, dark skin tone", "handshake"),
    ("kiss: man, man, dark skin tone", "kiss: man, man"),
    ("kiss: person, person, light skin tone, dark skin tone", "kiss"),
  ],
)
def test_base_name_drops_skin_tones_and_nothing_else(name, expected):
  names = frozenset(
    {
      "woman firefighter",
      "woman: red hair",
      "flag: France",
      "keycap: 1",
      "family: man, woman, boy",
      "handshake",
      "kiss",
      "kiss: man, man",
    }
  )
  assert emoji_build.base_name(name, names) == expected


def test_the_emoji_list_is_read_with_groups_and_inherited_keywords(entries):
  by_name = {entry.name: entry for entry in entries}
  assert len(entries) == 7
  dark = by_name["woman scientist: dark skin tone"]
  assert dark.base_name == "woman scientist"
  assert dark.keywords == ("lab coat",)
  assert (dark.group, dark.subgroup) == ("People & Body", "person-role")
  assert dark.codepoints == "1F469 1F3FF 200D 1F52C"
  assert by_name["scientist"].keywords == ()
  assert by_name["keycap: 1"].keywords == ("one",)
  assert by_name["keycap: 1"].subgroup == "keycap"


def test_a_built_set_returns_what_was_drawn(entries, tmp_path):
  emoji_build.build(entries, draw, tmp_path / "set")
  read = {
    record["name"]: record
    for split in ("train", "heldout")
    for record in emoji.load(split, tmp_path / "set")
  }
  assert set(read) == {entry.name for entry in entries}
  for entry in entries:
    record = read[entry.name]
    # 20 levels per channel are 255 / 19 apart.
    np.testing.assert_allclose(
      record["image"].astype(float), draw(entry.text), rtol=0, atol=7.5
    )
    assert record["base_name"] == entry.base_name
    assert record["keywords"] == entry.keywords
    assert record["group"] == entry.group
    assert record["subgroup"] == entry.subgroup
    assert record["codepoints"] == entry.codepoints
  heldout = emoji.load("heldout", tmp_path / "set")
  assert [r["name"] for r in heldout] == ["woman scientist: medium skin tone"]
  assert (tmp_path / "set" / "LICENSE").is_file()


def test_two_processes_build_equal_records(inputs, tmp_path):
  # Within one process protobuf orders the fields alike: that would prove less.
  code = (
    "import sys, numpy as np\n"
    "from sana_jax.data import emoji_build\n"
    "def draw(text):\n"
    "  rng = np.random.default_rng([ord(c) for c in text])\n"
    "  return rng.integers(256, size=(64, 64, 3), dtype=np.uint8)\n"
    "entries = emoji_build.read_emoji(*sys.argv[1:3])\n"
    "emoji_build.build(entries, draw, sys.argv[3])\n"
  )
  directories = tmp_path / "first", tmp_path / "second"
  for directory in directories:
    subprocess.run(
      [sys.executable, "-c", code, *inputs, directory],
      check=True,
      capture_output=True,
    )
  for split in ("train", "heldout"):
    first, second = (list(emoji.load(split, d)) for d in directories)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
      np.testing.assert_array_equal(one.pop("image"), other.pop("image"))
      assert one == other
  for name in ("dataset_info.json", "features.json", "LICENSE"):
    one, other = ((d / name).read_bytes() for d in directories)
    assert one == other


def test_encoding_keeps_white_and_black_exact():
  picture = np.zeros((64, 64, 3), np.uint8)
  picture[:32] = 255
  first = emoji_build.encode_image(picture)
  assert first == emoji_build.encode_image(picture)
  with emoji.Image.open(emoji.io.BytesIO(first)) as decoded:
    np.testing.assert_array_equal(np.asarray(decoded), picture)


@pytest.mark.skipif(not FONT.is_file(), reason="fonts-noto-color-emoji")
def test_the_font_draws_the_pictures_that_ship(bundled):
  render = emoji_build.font_renderer(FONT)
  for record in bundled["train"][::500] + bundled["heldout"][::40]:
    text = "".join(chr(int(c, 16)) for c in record["codepoints"].split())
    picture = render(text)
    assert picture.shape == (64, 64, 3)
    # Another version of the font may have redrawn some emoji a little.
    error = np.abs(picture.astype(float) - record["image"]).mean()
    assert error < 20
  with pytest.raises(ValueError, match="no glyph for 'a'"):
    render("a")


def test_a_source_is_random_access_and_can_be_sent_to_a_worker(bundled):
  source = emoji.load("heldout")
  copy = pickle.loads(pickle.dumps(source))
  for index in (79, 3, -1, np.int64(40)):
    expected = bundled["heldout"][index]
    for record in (source[index], copy[index]):
      assert record["name"] == expected["name"]
      np.testing.assert_array_equal(record["image"], expected["image"])
  with pytest.raises(IndexError, match="index 80 is outside 80 emoji"):
    source[80]


def test_reading_does_not_import_tensorflow():
  code = (
    "import sys\n"
    "from sana_jax.data import emoji\n"
    "assert emoji.load('train')[0]['name'] == 'grinning face'\n"
    "assert 'tensorflow' not in sys.modules\n"
  )
  subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_loading_says_which_splits_and_directories_there_are(tmp_path):
  with pytest.raises(ValueError, match="'test': expected one of heldout, tr"):
    emoji.load("test")
  with pytest.raises(FileNotFoundError, match=r"no emoji data set in .*gone"):
    emoji.load("train", tmp_path / "gone")


def test_missing_inputs_say_what_to_install(inputs, tmp_path):
  emoji_test, emojilib = inputs
  gone = tmp_path / "gone"
  with pytest.raises(FileNotFoundError, match=r"--emoji_test.*unicode-data"):
    emoji_build.read_emoji(gone, emojilib)
  with pytest.raises(FileNotFoundError, match=r"--emojilib.*npm install"):
    emoji_build.read_emoji(emoji_test, gone)
  with pytest.raises(FileNotFoundError, match=r"--font.*fonts-noto-color"):
    emoji_build.font_renderer(gone)
  with pytest.raises(ValueError, match="lists no fully-qualified emoji"):
    emoji_build.read_emoji(emojilib, emojilib)


def test_the_command_fails_in_one_line_when_a_file_is_missing(tmp_path):
  result = subprocess.run(
    [
      sys.executable,
      "-m",
      "sana_jax.data.emoji_build",
      f"--emoji_test={tmp_path / 'gone'}",
      f"--output_dir={tmp_path / 'set'}",
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 1
  assert len(result.stderr.splitlines()) == 1
  assert "apt-get install unicode-data" in result.stderr


def test_the_command_rejects_positional_arguments():
  with pytest.raises(emoji_build.app.UsageError, match="unexpected arguments"):
    emoji_build.main(["emoji_build", "extra"])


def test_building_refuses_to_overwrite_and_to_leave_a_split_empty(
  entries, tmp_path
):
  (tmp_path / "dataset_info.json").write_text("{}")
  with pytest.raises(ValueError, match="already holds a data set"):
    emoji_build.build(entries, draw, tmp_path)
  plain = [e for e in entries if e.name == e.base_name]
  with pytest.raises(ValueError, match="0 of 4 emoji are held out"):
    emoji_build.build(plain, draw, tmp_path / "set")


def test_captions_take_three_forms_at_the_given_rates():
  record = make_record(("fruit", "school", "mac", "healthy"))
  rng = np.random.default_rng(0)
  captions = [emoji.sample_caption(record, rng, 0.3, 0.2) for _ in range(4000)]
  parts = [caption.split(", ") for caption in captions]
  plain = np.mean([caption == "red apple" for caption in captions])
  alone = np.mean(["red apple" not in part for part in parts])
  # Four standard errors of a rate of one half over 4000 draws are 0.032.
  np.testing.assert_allclose([plain, alone], [0.5, 0.2], atol=0.032)
  for part in parts:
    keywords = part[1:] if part[0] == "red apple" else part
    assert len(keywords) <= 3
    assert len(set(keywords)) == len(keywords)
    assert set(keywords) <= set(record["keywords"])
  counts = [len(part) for part in parts if part[0] != "red apple"]
  assert set(counts) == {1, 2, 3}
  assert {word for part in parts for word in part[1:]} == {*record["keywords"]}


def test_captions_are_a_function_of_the_generator_state():
  record = make_record(("fruit", "school", "mac"))
  draws = [
    [
      emoji.sample_caption(record, rng, 0.5, 0.3)
      for rng in [np.random.default_rng(seed)] * 20
    ]
    for seed in (1, 1, 2)
  ]
  assert draws[0] == draws[1]
  assert draws[0] != draws[2]


def test_an_emoji_without_keywords_is_captioned_by_its_name():
  rng = np.random.default_rng(0)
  for _ in range(10):
    assert emoji.sample_caption(make_record(()), rng, 0.0, 1.0) == "red apple"


@pytest.mark.parametrize("rates", [(-0.1, 0.5), (0.5, -0.1), (0.6, 0.5)])
def test_caption_probabilities_must_leave_a_probability(rates):
  rng = np.random.default_rng(0)
  with pytest.raises(ValueError, match="sum to at most 1"):
    emoji.sample_caption(make_record(("fruit",)), rng, *rates)
