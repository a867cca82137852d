"""The doctor plans as the run of a config file does."""

import json
import shutil

import pytest

from sana_jax import config as config_lib
from sana_jax.data import opening
from sana_jax.tools import doctor, run_settings
from tests import pictures

FOLDER = "configs/folder.py"


@pytest.fixture
def folder(tmp_path, rng):
  files = {}
  # Shapes that multiples of 16 and of 32 sort differently.
  for i, size in enumerate([(80, 80)] * 34 + [(80, 96)] * 33):
    files[f"{i}.png"] = pictures.encode(pictures.picture(rng, *size), "PNG")
    files[f"{i}.txt"] = f"number {i}".encode()
  return pictures.write_folder(tmp_path / "pictures", files)


def examine(capsys, folder, *flags):
  doctor.main([str(folder), "--json", *flags])
  return json.loads(capsys.readouterr().out)


def write(tmp_path, body):
  path = tmp_path / "run.py"
  path.write_text(body)
  return str(path)


def test_shapes_and_batches_are_those_of_the_run(folder, capsys):
  report = examine(capsys, folder, f"--config={FOLDER}", "--buckets=aspect")
  opened = opening.open_pictures(
    config_lib.DataConfig(path=str(folder), image_size=64, buckets="aspect"),
    multiple=16,
    tokenize=lambda texts: {},
    batch_size=32,
    seed=0,
  )
  shapes = [(b["height"], b["width"]) for b in report["buckets"]]
  assert shapes == list(opened.shapes)
  assert len(shapes) == 2
  expected = sum(opened.plans.batches_per_epoch())
  assert report["batches_per_epoch"] == expected == 67 / 32
  assert (report["config"], report["multiple"]) == (FOLDER, 16)


def test_flags_win_over_the_config(folder, capsys):
  report = examine(capsys, folder, f"--config={FOLDER}")
  assert [b["count"] for b in report["buckets"]] == [67]  # Squares.
  assert (report["image_size"], report["batch_size"]) == (64, 32)
  report = examine(
    *(capsys, folder, f"--config={FOLDER}", "--multiple=32"),
    *("--batch_size=4", "--image_size=32", "--min_clip_score=3"),
  )
  assert (report["image_size"], report["batch_size"]) == (32, 4)
  assert (report["multiple"], report["min_clip_score"]) == (32, 3)


def test_without_a_config_the_multiple_and_where_to_get_it_are_said(
  folder, capsys
):
  flags = ("--image_size=64", "--buckets=square")
  doctor.main([str(folder), *flags])
  out = capsys.readouterr().out
  assert "image_size 64, of sides that are multiples of 32:" in out
  assert "--config=FILE takes what a run has" in out
  doctor.main([str(folder), f"--config={FOLDER}"])
  out = capsys.readouterr().out
  assert "image_size 64, of sides that are multiples of 16:" in out
  assert "--config=FILE" not in out


def test_a_published_model_needs_no_download():
  values = run_settings.of_config("configs/sana15_1600m_1024.py:v5e-256")
  assert (values["multiple"], values["image_size"]) == (32, 1024)
  assert (values["batch_size"], values["max_buckets"]) == (512, 40)
  assert values["buckets"] == "aspect"
  assert "tokenizer" not in values


def test_components_in_a_directory_are_looked_into(tmp_path):
  shutil.copytree("sana_jax/assets/emoji_model/vae", tmp_path / "c" / "vae")
  file = write(
    tmp_path,
    "from sana_jax import config as config_lib\n"
    "def get_config():\n"
    "  config = config_lib.TextToImageConfig(max_sequence_length=7)\n"
    f"  config.components = {str(tmp_path / 'c')!r}\n"
    "  config.model.patch_size = 2\n"
    "  return config\n",
  )
  values = run_settings.of_config(file)
  assert (values["multiple"], values["max_sequence_length"]) == (32, 7)
  assert "tokenizer" not in values
  (tmp_path / "c" / "tokenizer").mkdir()
  values = run_settings.of_config(file)
  assert values["tokenizer"] == str(tmp_path / "c" / "tokenizer")


@pytest.mark.parametrize(
  ("file", "message"),
  [
    (f"{FOLDER}:v5e-8", r"its get_config\(\) takes no argument"),
    ("configs/stages_sana_1600m.py", "has several runs: give the config"),
    ("configs/emoji_dcae.py", "TextToImageConfig, got AutoencoderConfig"),
  ],
)
def test_configs_that_are_no_run_of_text_to_image_are_refused(file, message):
  with pytest.raises(ValueError, match=message):
    run_settings.of_config(file)


def test_files_that_cannot_be_run_are_one_line(tmp_path, capsys):
  for body, message in (
    ("x = 1\n", "has no get_config()."),
    ("import nowhere_to_be_found\n", "'nowhere_to_be_found'. Is this the"),
    (
      "from sana_jax import config\n"
      "def get_config():\n"
      "  return config.TextToImageConfig().nosuch\n",
      "has no attribute 'nosuch'. Is this the directory",
    ),
  ):
    file = write(tmp_path, body)
    assert doctor.main([str(tmp_path), f"--config={file}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"doctor: --config={file}: ")
    assert message in line
  assert doctor.main([str(tmp_path), f"--config={tmp_path / 'no.py'}"]) == 2
  assert "no.py" in capsys.readouterr().err
