"""The doctor finds every planted fault, nothing else, and changes nothing."""

import hashlib
import json
import re
import uuid

import numpy as np
import PIL.Image
import pytest

from sana_jax import config as config_lib
from sana_jax.data import opening, sources, storage
from sana_jax.data.sources import array_record
from sana_jax.tools import contact_sheet, diagnosis, doctor
from tests import pictures

SIDE = pictures.SIDE


def found(report):
  return {
    (code, item["key"].rpartition(":")[2])
    for code, entry in report["findings"].items()
    for item in entry["items"]
  }


def run(capsys, *args):
  code = doctor.main([*map(str, args)])
  output = capsys.readouterr()
  return code, output.out, output.err


def checksums(root):
  return {
    path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime)
    for path in sorted(root.rglob("*"))
    if path.is_file()
  }


def test_every_planted_fault_is_found_in_every_format(tmp_path, rng, capsys):
  files, faults = pictures.planted(rng)
  folder = pictures.write_folder(tmp_path / "folder", files)
  pictures.write_tar(tmp_path / "tars" / "0.tar", files)
  before = checksums(tmp_path)
  for root in (folder, tmp_path / "tars"):
    code, out, _ = run(capsys, root, "--image_size=512", "--json")
    assert code == 1
    assert found(json.loads(out)) == faults
  assert checksums(tmp_path) == before
  # A table has no stray files, and its captions are text.
  (folder / "garbled.txt").write_text("mended")
  (folder / "lonely.txt").unlink()
  source = sources.open_source(folder)
  pictures.write_parquet(tmp_path / "t" / "t.parquet", source)
  code, out, _ = run(capsys, tmp_path / "t", "--image_size=512", "--json")
  assert code == 1
  # An empty cell and an empty text are both empty captions.
  elsewhere = {"orphan", "unreadable_record", "missing_caption"}
  expected = {fault for fault in faults if fault[0] not in elsewhere}
  assert found(json.loads(out)) - {("empty_caption", "bare")} == expected


def test_the_report_counts_buckets_and_escapes_captions(tmp_path, rng, capsys):
  files, _ = pictures.planted(rng)
  folder = pictures.write_folder(tmp_path / "folder", files)
  code, out, _ = run(
    capsys,
    *(folder, "--image_size=512", "--batch_size=1"),
    *("--report", tmp_path / "report"),
  )
  assert code == 1
  assert "warning: 1 captions are too long (long_caption)" in out
  assert "problems found" in out
  report = json.loads((tmp_path / "report" / "report.json").read_text())
  assert report["records"] == 19
  assert "bundled" in report["tokenizer"]
  buckets = {(b["height"], b["width"]): b for b in report["buckets"]}
  # 19 without one unread, three undecodable, and three of other shapes.
  assert buckets[512, 512]["count"] == 12
  assert buckets[512, 512]["batches"] == 12
  assert report["batches_per_epoch"] == 15
  assert sum(report["aspects"].values()) == 15
  assert sum(report["resolutions"].values()) == 15
  ten = min(buckets.items(), key=lambda item: item[0][0] / item[0][1])[1]
  # 10:1 in 4:1.
  np.testing.assert_allclose(ten["cropped"], 0.6, atol=1e-6)
  page = (tmp_path / "report" / "contact_sheet.html").read_text()
  assert "&lt;b&gt;picture&lt;/b&gt;" in page
  assert "<b>picture" not in page
  assert page.count("<img") == 15
  assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_healthy_folder_is_healthy_and_an_unusable_one_is_not(
  tmp_path, rng, capsys
):
  healthy = tmp_path / "healthy"
  image = pictures.encode(pictures.picture(rng, SIDE, SIDE))
  pictures.write_folder(healthy, {"a.jpg": image, "a.txt": b"a cat"})
  code, out, _ = run(capsys, healthy, "--image_size=512")
  assert (code, out.splitlines()[-1]) == (0, "healthy")
  code, out, _ = run(
    capsys, healthy, "--max_sequence_length=2", "--image_size=512"
  )
  assert code == 1
  broken = pictures.write_folder(tmp_path / "broken", {"a.jpg": b""})
  code, _, err = run(capsys, broken)
  assert code == 2
  assert "no picture of" in err
  code, _, err = run(capsys, tmp_path / "nowhere")
  assert code == 2
  assert "There is nothing at" in err
  code, _, err = run(capsys, healthy, "--tokenizer", tmp_path)
  assert code == 2
  assert "No tokenizer in" in err
  with pytest.raises(SystemExit, match="2"):
    doctor.main([str(healthy), "--batch_size=0"])
  assert "--batch_size must be at least 1, got 0" in capsys.readouterr().err


def test_flat_pictures_of_other_colours_are_no_duplicates(tmp_path):
  for i, color in enumerate(("red", "blue", "lime", "red")):
    PIL.Image.new("RGB", (40 + i, 40), color).save(tmp_path / f"{i}.png")
  source = sources.open_source(tmp_path)
  settings = diagnosis.Settings.load(
    image_size=512,
    kind="aspect",
    multiple=32,
    max_buckets=10,
    batch_size=1,
    tokenizer=None,
    max_tokens=300,
  )
  examined = diagnosis.examine_all(source, settings, 2)
  pairs = diagnosis.duplicates(examined)
  assert [(a.key, b.key) for a, b in pairs] == [("3", "0")]
  found = diagnosis.sort(source.name, examined, settings)
  report = diagnosis.summarize(source, examined, found, settings)
  assert contact_sheet.page(source, examined, report).count("<figure") == 4


def healthy_folder(root, rng, shapes=((SIDE, SIDE),)):
  files = {}
  for i, shape in enumerate(shapes):
    files[f"{i}.jpg"] = pictures.encode(pictures.picture(rng, *shape))
    files[f"{i}.txt"] = f"Picture number {i}".encode()
  return pictures.write_folder(root, files)


def test_the_doctor_expects_the_batches_that_training_reports(
  tmp_path, rng, capsys
):
  shapes = [(80, 80)] * 5 + [(80, 130)] * 3 + [(130, 80)]
  folder = healthy_folder(tmp_path / "f", rng, shapes)
  for options, kwargs in (
    ({"image_size": 48, "buckets": "square"}, {}),
    ({"image_size": 64, "buckets": "aspect", "max_buckets": 2}, {}),
    ({"image_size": 64, "buckets": "aspect"}, {"multiple": 32}),
  ):
    opened = opening.open_pictures(
      config_lib.DataConfig(path=str(folder), **options),
      multiple=kwargs.get("multiple", 16),
      tokenize=lambda texts: {"length": np.array([len(t) for t in texts])},
      batch_size=4,
      seed=0,
    )
    flags = {"multiple": 16, "batch_size": 4} | options | kwargs
    code, out, _ = run(
      capsys,
      *(folder, "--json"),
      *(f"--{name}={value}" for name, value in flags.items()),
    )
    report = json.loads(out)
    ours = [(b["height"], b["width"]) for b in report["buckets"]]
    assert ours == list(opened.shapes)
    assert report["batches_per_epoch"] == 9 / 4
    assert report["moved"] == opened.reports[0].moved
    assert code == (1 if report["findings"] else 0)
  code, out, _ = run(
    capsys,
    *(folder, "--image_size=64", "--buckets=square", "--batch_size=16"),
  )
  assert "9     0.56" in out
  assert "0.56 batches per epoch; what fills none waits" in out
  # Squares cut more from ordinary pictures than shapes of their own would.
  assert (code, out.splitlines()[-1]) == (0, "healthy")


def plan(folder, **options):
  """What training reports of pictures, and plans with, in batches of 4."""
  return opening.open_pictures(
    config_lib.DataConfig(path=str(folder), image_size=64, **options),
    multiple=16,
    tokenize=lambda texts: {"length": np.array([len(t) for t in texts])},
    batch_size=4,
    seed=0,
  )


def batches(opened):
  return float(sum(opened.plans.batches_per_epoch()))


def test_what_training_counts_unless_it_verifies_is_named(
  tmp_path, rng, capsys
):
  folder = healthy_folder(tmp_path / "f", rng, [(80, 80)] * 6)
  flags = ("--image_size=64", "--buckets=square", "--multiple=16")
  flags += ("--batch_size=4", f"--report={tmp_path / 'report'}")
  _, out, _ = run(capsys, folder, *flags)
  assert "verify" not in out
  whole = (folder / "4.jpg").read_bytes()
  (folder / "4.jpg").write_bytes(whole[: len(whole) * 2 // 3])
  (folder / "5.txt").write_bytes(b"\xff\xfe")
  # What has no header is counted by neither.
  (folder / "6.jpg").write_bytes(rng.bytes(100))
  code, out, _ = run(capsys, folder, *flags)
  assert code == 1
  text = "2 broken records have a header that can be read: training counts"
  assert f"\n{text}" in out
  assert "unless it is told --config.data.verify=True" in out
  report = json.loads((tmp_path / "report" / "report.json").read_text())
  assert report["unverified"] == ["4", "5"]
  assert report["advice"][0].startswith(text)
  page = (tmp_path / "report" / "contact_sheet.html").read_text()
  assert f"<p>{text}" in page
  verified = plan(folder, verify=True)
  assert report["batches_per_epoch"] == batches(verified) == 1
  assert batches(plan(folder)) == 1.5


def test_pictures_of_a_low_score_are_left_out_as_training_does(
  tmp_path, rng, capsys
):
  folder = healthy_folder(tmp_path / "f", rng, [(80, 80)] * 6 + [(80, 120)])
  for key, score in ((0, 21.9), (1, 22), (6, 3)):
    value = {"prompt": f"Picture {key}", "clip_score": score}
    (folder / f"{key}.txt").unlink()
    (folder / f"{key}.json").write_text(json.dumps(value))
  whole = (folder / "0.jpg").read_bytes()
  flags = ("--image_size=64", "--multiple=16", "--batch_size=4", "--json")
  options = {"buckets": "aspect", "min_clip_score": 22.0}
  code, out, _ = run(capsys, folder, *flags, "--min_clip_score=22")
  report = json.loads(out)
  opened = plan(folder, **options)
  assert code == 0  # What was asked for is no fault.
  why = "the CLIP score of its prompt is below 22"
  assert report["findings"].keys() == {"low_score"}
  assert report["findings"]["low_score"]["items"] == [
    {"key": "0", "detail": why},
    {"key": "6", "detail": why},
  ]
  assert dict(opened.reports[0].skipped) == {why: 2}
  ours = [(b["height"], b["width"]) for b in report["buckets"]]
  assert ours == list(opened.shapes)
  assert report["batches_per_epoch"] == batches(opened) == 5 / 4
  # A broken picture with a low score is not counted in any case.
  (folder / "0.jpg").write_bytes(whole[: len(whole) * 2 // 3])
  _, out, _ = run(capsys, folder, *flags, "--min_clip_score=22")
  assert json.loads(out)["unverified"] == []
  _, out, _ = run(capsys, folder, *flags)
  assert json.loads(out)["unverified"] == ["0"]
  assert json.loads(out)["batches_per_epoch"] == 6 / 4


def test_a_score_that_none_reaches_leaves_nothing(tmp_path, rng, capsys):
  folder = healthy_folder(tmp_path / "f", rng)
  (folder / "0.txt").unlink()
  (folder / "0.json").write_text('{"prompt": "a", "clip_score": 20}')
  code, _, err = run(capsys, folder, "--min_clip_score=30")
  assert code == 2
  assert "no picture of" in err
  assert "can be used" in err


def test_sizes_that_no_model_has_are_refused(tmp_path, capsys):
  for flag, message in (
    ("--image_size=1000", "must be a multiple of --multiple=32, got 1000"),
    ("--max_sequence_length=0", "--max_sequence_length must be at least 1"),
    ("--min_clip_score=-1", "--min_clip_score must be at least 0, got -1.0"),
    ("--min_clip_score=nan", "--min_clip_score must be at least 0, got nan"),
  ):
    with pytest.raises(SystemExit, match="2"):
      doctor.main([str(tmp_path), flag])
    assert message in capsys.readouterr().err


def test_palettes_are_healthy_and_pictures_of_nothing_are_not(
  tmp_path, rng, capsys
):
  folder = healthy_folder(tmp_path / "f", rng)
  image = pictures.picture(rng, SIDE, SIDE).quantize(64)
  image.save(folder / "palette.png")
  pictures.picture(rng, SIDE, SIDE).quantize(64).save(folder / "still.gif")
  for name in ("palette", "still"):
    (folder / f"{name}.txt").write_text(name)
  code, out, _ = run(capsys, folder, "--image_size=512", "--json")
  assert code == 0
  assert found(json.loads(out)) == {
    ("palette", "palette"),
    ("palette", "still"),
  }
  # What is transparent may be of any colours.
  colors = pictures.picture(rng, SIDE, SIDE).convert("RGBA")
  colors.putalpha(0)
  colors.save(folder / "glass.png")
  PIL.Image.new("RGB", (SIDE, SIDE)).save(folder / "night.jpg")
  for name in ("glass", "night"):
    (folder / f"{name}.txt").write_text(name)
  code, out, _ = run(capsys, folder, "--image_size=512", "--json")
  assert code == 1
  assert found(json.loads(out)) >= {
    ("transparent", "glass"),
    ("single_color", "night"),
  }
  assert len(found(json.loads(out))) == 4


def test_files_that_are_not_read_are_found(tmp_path, rng, capsys):
  folder = healthy_folder(tmp_path / "f", rng)
  (folder / "README.md").write_text("about")
  code, out, _ = run(capsys, folder, "--image_size=512")
  assert code == 0
  assert "info: 1 files are neither pictures nor about any (other_file)" in out
  (folder / "a.jxl").write_bytes(b"x")
  (folder / ".b.jpg").write_bytes(b"x")
  code, out, _ = run(capsys, folder, "--image_size=512")
  assert code == 1
  assert "warning: 2 pictures are of a kind that is not read (not_read)" in out
  assert "  a.jxl: .jxl is not read; convert it to .png or .jpg" in out
  assert "  .b.jpg: hidden files and those of hidden directories" in out


def test_damaged_array_records_are_examined_as_far_as_they_go(
  tmp_path, rng, capsys
):
  folder = healthy_folder(tmp_path / "f", rng, [(SIDE, SIDE)] * 4)
  path = tmp_path / "x.array_record"
  source = sources.open_source(folder)
  array_record.write(str(path), source)
  content = bytearray(path.read_bytes())
  # Records lie one behind the other; the file is padded. The first is whole.
  place = len(source[0].image) + 4000
  content[place : place + 50] = b"\xff" * 50
  path.write_bytes(content)
  code, out, _ = run(capsys, path, "--image_size=512", "--json")
  assert code == 1
  codes = found(json.loads(out))
  assert codes == {("unreadable_record", "1")}
  # Without its end nothing is known of it.
  path.write_bytes(content[: len(content) // 2])
  code, _, err = run(capsys, path)
  assert code == 2
  assert "x.array_record does not end with an index" in err


def test_reports_go_to_any_store_but_not_into_the_source(tmp_path, rng, capsys):
  folder = healthy_folder(tmp_path / "f", rng)
  report = f"memory://{uuid.uuid4().hex}/report"
  code, _, _ = run(capsys, folder, "--image_size=512", f"--report={report}")
  assert code == 0
  place = storage.Location.of(report)
  assert json.loads((place / "report.json").read())["healthy"]
  assert (place / "contact_sheet.html").read().count(b"<figure") == 1
  before = checksums(folder)
  code, _, err = run(capsys, folder, "--report", folder / "report")
  assert code == 2
  assert "is within" in err
  assert checksums(folder) == before
  file = tmp_path / "file"
  file.write_text("no directory")
  code, out, err = run(capsys, folder, "--report", file / "x")
  assert (code, out) == (2, "")
  assert err.startswith("doctor: ")
  assert "file" in err


def test_the_loss_that_is_named_is_that_of_the_shape_trained_at(
  tmp_path, rng, capsys
):
  # In shapes of their own, the wide ones would lose 60 % and 10 %.
  shapes = [(60, 90)] * 8 + [(128, 1280)] + [(60, 200)] * 3
  folder = healthy_folder(tmp_path / "f", rng, shapes)
  flags = ("--image_size=64", "--batch_size=8", "--json")
  _, out, _ = run(capsys, folder, *flags)
  report = json.loads(out)
  named = report["findings"]["extreme_aspect"]["items"]
  (bucket,) = report["buckets"]
  assert (bucket["height"], bucket["width"]) == (64, 96)
  assert sorted(named, key=lambda item: int(item["key"])) == [
    {
      "key": "8",
      "detail": "128 x 1280 loses 85% in 64 x 96, as 32 x 128 is not kept",
    },
    *(
      {
        "key": f"{i}",
        "detail": "60 x 200 loses 55% in 64 x 96, as 32 x 96 is not kept",
      }
      for i in (9, 10, 11)
    ),
  ]
  # What is named is what the buckets lose.
  lost = (0.85 + 3 * 0.55) / len(shapes)
  np.testing.assert_allclose(bucket["cropped"], lost, atol=1e-6)
  # With as many others, a wider shape is kept.
  _, out, _ = run(capsys, folder, *flags, "--batch_size=4")
  (item,) = json.loads(out)["findings"]["extreme_aspect"]["items"]
  why = "in 32 x 96, as 32 x 128 is not kept"
  assert item == {"key": "8", "detail": f"128 x 1280 loses 70% {why}"}
