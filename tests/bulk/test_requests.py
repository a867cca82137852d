"""Every format gives the same requests, and bad lines are named."""

import csv
import json
import random
import string
import tracemalloc

import PIL.Image
import pyarrow
import pytest
from pyarrow import parquet

from sana_jax.bulk import requests

RECORDS = (
  {"prompt": "a red apple, on a table"},
  {"prompt": "ein grüner Käfer", "seed": 7, "num_images_per_prompt": 2},
  {"prompt": 'a "sign"', "negative_prompt": "blurry", "height": 64},
  {"prompt": "a cat", "guidance_scale": 2.0, "num_inference_steps": 3},
  {"prompt": "a dog", "use_resolution_binning": False, "image_index": 4},
)


def read(path, **defaults):
  return list(requests.Reader(**defaults).read(path))


def reasons(items) -> dict[int, str]:
  return {i.line: i.reason for i in items if isinstance(i, requests.Problem)}


def split(items):
  good = [i for i in items if isinstance(i, requests.Request)]
  return good, [i for i in items if isinstance(i, requests.Problem)]


def good_lines(items) -> list[int]:
  return [i.line for i in items if isinstance(i, requests.Request)]


def without_place(items):
  return [
    (i.prompt, i.negative_prompt, i.seed, i.image_index, i.count, i.settings)
    for i in items
  ]


def write_csv(path, records):
  names = sorted({name for record in records for name in record})
  with path.open("w", newline="", encoding="utf-8") as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(records)


def test_all_formats_give_the_same_requests(tmp_path):
  lines = tmp_path / "a.jsonl"
  lines.write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
  write_csv(tmp_path / "a.csv", RECORDS)
  parquet.write_table(
    pyarrow.Table.from_pylist(
      [dict.fromkeys({k for r in RECORDS for k in r}) | r for r in RECORDS]
    ),
    tmp_path / "a.parquet",
  )
  expected = without_place(read(lines))
  assert expected[1] == ("ein grüner Käfer", "", 7, None, 2, ())
  assert expected[2][1] == "blurry"
  assert expected[2][5] == (("height", 64),)
  assert expected[3][5] == (("guidance_scale", 2.0), ("num_inference_steps", 3))
  assert expected[4][3] == 4
  assert expected[4][5] == (("use_resolution_binning", False),)
  for suffix in ("csv", "parquet"):
    assert without_place(read(tmp_path / f"a.{suffix}")) == expected


def test_a_text_file_has_a_prompt_a_line(tmp_path):
  path = tmp_path / "a.txt"
  path.write_bytes(b"\xef\xbb\xbfa green cat\r\n\n  a table! \n\xff\xfe\nend")
  items = read(path)
  assert [(i.line, i.prompt) for i in items[:2]] == [
    (1, "a green cat"),
    (3, "a table!"),
  ]
  assert reasons(items) == {4: "the line is not UTF-8"}
  assert items[-1].prompt == "end"


def test_bad_json_lines_are_named_and_the_rest_goes_on(tmp_path):
  bad = {
    2: ('{"prompt": "a"', "broken JSON"),
    3: ('["a"]', "expected a JSON object"),
    4: ('{"prompt": ""}', "the prompt is empty"),
    5: ('{"seed": 3}', "there is no prompt"),
    6: ('{"prompt": "a", "sed": 3}', r"unknown fields ['sed']; there are"),
    7: ('{"prompt": "a", "seed": "3"}', "seed: expected a whole number"),
    8: ('{"prompt": "a", "seed": true}', "seed: expected a whole number"),
    9: ('{"prompt": 5}', "prompt: expected a text, got 5"),
    10: ('{"prompt": "a", "seed": -1}', "seed must be in"),
    11: ('{"prompt": "a", "num_images_per_prompt": 0}', "at least 1, got 0"),
    12: ('{"prompt": "a", "num_inference_steps": 0}', "must be at least 1"),
    13: ('{"prompt": "a", "guidance_scale": NaN}', "NaN is no number"),
    14: ('{"prompt": "a", "guidance_interval": [1]}', "expected 2 numbers"),
    15: ('{"prompt": "a", "lowercase": "yes"}', "expected true or false"),
    16: ("[" * 100_000, "broken JSON"),
    17: ('{"prompt": "a", "height": 1.5}', "height: expected a whole number"),
    18: (
      '{"prompt": "a", "complex_human_instruction": [1]}',
      "expected a text, got 1",
    ),
    19: (
      '{"prompt": "a", "image_index": -1, "num_images_per_prompt": 5}',
      "image_index must be",
    ),
    20: ('{"prompt": "a", "image": ""}', "image: expected the path of a"),
    21: ('{"prompt": "a", "num_inference_steps": "2"}', "number, got '2'"),
    22: ('{"prompt": "a", "guidance_interval": "0.2"}', "numbers, got '0.2'"),
    23: ('{"prompt": "a", "height": 1e400}', "whole number, got inf"),
  }
  good = '{"prompt": "a", "seed": null, "height": 8.0, "width": null}'
  lines = [good, *(line for line, _ in bad.values()), "", good]
  path = tmp_path / "a.jsonl"
  path.write_text("\n".join(lines))
  items = read(path)
  assert good_lines(items) == [1, len(lines)]
  assert items[0].settings == (("height", 8), ("width", None))
  found = reasons(items)
  assert set(found) == set(bad)
  for line, (_, reason) in bad.items():
    assert reason in found[line]
  problem = next(i for i in items if isinstance(i, requests.Problem))
  assert str(problem).startswith(f"{path}:2: broken JSON")


def test_bad_lines_leave_room_for_the_images_that_they_would_make(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text(
    '{"prompt": "a", "num_images_per_prompt": 4, "sed": 1}\n'
    '{"prompt": "a", "num_images_per_prompt": 5, "seed": -1}\n'
    '{"prompt": "a", "num_images_per_prompt": "6"}\n'
    '{"prompt": "a", "num_images_per_prompt": 0}\n'
    '{"prompt": "a", "num_images_per_prompt": 1000000, "seed": -1}\n'
    '{"prompt": "a", "num_images_per_prompt": 7'
  )
  assert [i.count for i in read(path, count=2)] == [4, 5, 2, 2, 2, 2]
  with (tmp_path / "a.csv").open("w") as file:
    file.write("prompt,num_images_per_prompt,seed\na,3,x\na,4,-1\na,y,\n")
  assert [i.count for i in read(tmp_path / "a.csv")] == [3, 4, 1]


def test_bad_csv_rows_are_named_by_their_first_line(tmp_path):
  path = tmp_path / "a.csv"
  path.write_bytes(
    b"prompt,seed,guidance_interval,lowercase\n"
    b"a cat,5,,\n"
    b'"two\nlines",,"0.1, 0.9",TRUE\n'
    b"a dog,five,,\n"
    b"a dog,,,,extra\n"
    b",5,,\n"
    b"a d\xff,,,\n"
    b"\n"
    b"a dog,,none,\n"
    b"a dog,,0.5,\n"
    b'a "dog" x,"a"b,,\n'
    b"a dog,,,\n"
  )
  items = read(path)
  assert good_lines(items) == [2, 3, 10, 13]
  assert items[1].prompt == "two\nlines"
  assert items[1].settings == (
    ("guidance_interval", (0.1, 0.9)),
    ("lowercase", True),
  )
  found = reasons(items)
  assert list(found) == [5, 6, 7, 8, 11, 12]
  assert "seed: expected a whole number, got 'five'" in found[5]
  assert "expected 4 cells, got 5" in found[6]
  assert "the prompt is empty" in found[7]
  assert "not UTF-8" in found[8]
  assert "expected 2 numbers" in found[11]
  assert "broken CSV" in found[12]


def test_bad_parquet_rows_are_named(tmp_path):
  path = tmp_path / "a.parquet"
  table = {"prompt": ["a", None, " ", "b"], "seed": [1, 2, None, -5]}
  parquet.write_table(pyarrow.table(table), path)
  items = read(path)
  assert good_lines(items) == [1]
  found = reasons(items)
  assert list(found) == [2, 3, 4]
  assert found[2] == "there is no prompt"
  assert "seed must be in" in found[4]


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.csv", b"text\na\n", "no column 'prompt', only"),
    ("a.csv", b"prompt,sed\na,1\n", r"unknown fields \['sed'\]"),
    ("a.csv", b"prompt,prompt\na,1\n", "names a column twice"),
    ("a.csv", b'"pro"mpt\n', "cannot be read as CSV"),
    ("a.parquet", b"PAR1 but not really", "cannot be read as Parquet"),
    ("a.json", b"{}", "ends in '.json'; expected one of .txt, .jsonl"),
  ],
)
def test_unreadable_files_are_refused(tmp_path, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=message):
    read(tmp_path / name)
  with pytest.raises(FileNotFoundError, match="does not exist"):
    read(tmp_path / "nowhere.txt")


def test_lines_override_the_command_line(tmp_path):
  path = tmp_path / "a.jsonl"
  path.write_text('{"prompt": "a"}\n{"prompt": "b", "height": 9, "seed": 1}')
  first, second = read(
    path, negative_prompt="bad", count=3, settings={"height": 8, "width": 8}
  )
  assert first.settings == (("height", 8), ("width", 8))
  assert second.settings == (("height", 9), ("width", 8))
  assert (first.count, first.negative_prompt) == (3, "bad")


def test_impossible_defaults_are_refused():
  with pytest.raises(ValueError, match="num_inference_steps must be at least"):
    requests.Reader(settings={"num_inference_steps": 0})
  with pytest.raises(ValueError, match="num_images_per_prompt must be"):
    requests.Reader(count=0)


def test_what_a_checkpoint_refuses_is_found_once_for_each_kind():
  make = requests.Reader().make
  rows = [
    make("f", 1, {"prompt": "a"}),
    make("f", 2, {"prompt": "b", "height": 7}),
    make("f", 3, {"prompt": "c", "height": 7, "seed": 4}),
    make("f", 4, {"prompt": "d", "negative_prompt": "x"}),
  ]
  asked = []

  def resolve(request, ratio):
    assert ratio is None
    asked.append(request.line)
    if request.settings:
      raise ValueError("height 7 is odd.")
    return (("height", 8),)

  items = requests.usable(rows, resolve)
  assert [i.line for i in items] == [1, 2, 3, 4]
  good, problems = split(items)
  assert asked == [1, 2, 4]
  assert [(r.line, r.settings) for r in good] == [
    (1, (("height", 8),)),
    (4, (("height", 8),)),
  ]
  assert [str(p) for p in problems] == [
    "f:2: height 7 is odd",
    "f:3: height 7 is odd",
  ]


def test_a_line_with_a_picture_that_cannot_be_read_is_left_out(tmp_path):
  PIL.Image.new("RGB", (20, 10)).save(tmp_path / "good.png")
  (tmp_path / "bad.png").write_bytes(b"no picture")
  make = requests.Reader(pictures={"image": str(tmp_path / "good.png")}).make
  rows = [
    make("f", 1, {"prompt": "a"}),
    make("f", 2, {"prompt": "a", "image": str(tmp_path / "bad.png")}),
    make("f", 3, {"prompt": "a", "image": str(tmp_path / "nowhere.png")}),
  ]
  ratios = []

  def resolve(request, ratio):
    ratios.append(ratio)
    return request.settings

  good, problems = split(requests.usable(rows, resolve))
  assert [r.line for r in good] == [1]
  assert ratios == [0.5]
  assert "f:2: cannot read" in str(problems[0])
  assert "f:3: cannot read" in str(problems[1])


def test_an_aspect_and_sides_replace_each_other():
  make = requests.Reader(settings={"height": 64, "width": 32}).make
  request = make("f", 1, {"prompt": "a", "aspect": "16:9"})
  assert request.settings == (("aspect", "16:9"),)
  make = requests.Reader(settings={"aspect": "16:9"}).make
  assert make("f", 1, {"prompt": "a", "width": 8}).settings == (("width", 8),)
  with pytest.raises(ValueError, match="aspect '16:9' cannot go with height"):
    make("f", 1, {"prompt": "a", "width": 8, "aspect": "16:9"})


@pytest.mark.slow
def test_many_lines_take_little_memory(tmp_path):
  rng = random.Random(0)
  path = tmp_path / "a.jsonl"
  with path.open("w") as file:
    for i in range(20_000):
      prompt = "".join(rng.choices(string.ascii_letters, k=60))
      height = rng.choice((256, 512))
      file.write(json.dumps({"prompt": prompt, "seed": i, "height": height}))
      file.write("\n")
  tracemalloc.start()
  items = list(requests.Reader().read(path))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert len(items) == 20_000
  # A million lines fit half a gigabyte.
  assert peak < 10 << 20, peak
