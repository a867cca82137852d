"""The doctor finds every planted fault, nothing else, and changes nothing."""

import hashlib
import json
import re

import numpy as np
import PIL.Image
import pytest

from sana_jax.data import sources
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
    *(folder, "--image_size=512", "--batch_size=4"),
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
  assert buckets[512, 512]["batches"] == 3
  assert report["leftover"] == 3
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
  code, out, _ = run(capsys, healthy, "--max_tokens=2", "--image_size=512")
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
  settings = diagnosis.Settings.load(512, 1, None, 300)
  examined = diagnosis.examine_all(source, settings, 2)
  pairs = diagnosis.duplicates(examined)
  assert [(a.key, b.key) for a, b in pairs] == [("3", "0")]
  report = diagnosis.summarize(source, examined, settings)
  assert contact_sheet.page(source, examined, report).count("<figure") == 4
