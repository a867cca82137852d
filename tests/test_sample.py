"""sample.py writes pictures that know their origin, and fails in one line."""

import hashlib
import json
import subprocess
import sys

import PIL.Image
import pytest
from absl import flags
from absl.testing import flagsaver

import sample
from sana_jax.pipeline import files as pipeline_files
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  tokenizer = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(tokenizer)
  path = tmp_path_factory.mktemp("checkpoint")
  tiny.make_pipeline(tokenizer).save_pretrained(path)
  return path


@pytest.fixture
def run(checkpoint, tmp_path, monkeypatch):
  """Runs sample.main with flags; returns the directory of its outputs."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(["sample.py"])
  monkeypatch.setattr(sample.warnings, "showwarning", None)

  def call(**values):
    defaults = {
      "checkpoint": str(checkpoint),
      "output_dir": str(tmp_path / "out"),
      "num_inference_steps": 1,
    }
    with flagsaver.flagsaver(**defaults | values):
      sample.main(["sample.py"])
    return tmp_path / "out"

  return call


def picture(path) -> PIL.Image.Image:
  with PIL.Image.open(path) as image:
    image.load()
  return image


def failure(run, capsys, **values) -> str:
  with pytest.raises(SystemExit) as error:
    run(**values)
  assert error.value.code == 1
  message = capsys.readouterr().err.strip().splitlines()[-1]
  assert message.startswith("sample.py: ")
  return message


def test_images_of_flags_and_files_are_written_and_listed(
  run, tmp_path, capsys
):
  file = tmp_path / "prompts.txt"
  file.write_text("a green cat\n\n a table! \n")
  out = run(
    prompt=["a red apple"], prompt_file=str(file), batch_size=2, grid=True
  )
  names = ["0000-a-red-apple", "0001-a-green-cat", "0002-a-table", "grid"]
  assert capsys.readouterr().out.split() == [
    str(out / f"{name}.png") for name in names
  ]
  assert picture(out / "0002-a-table.png").size == (32, 32)
  assert picture(out / "grid.png").size == (64, 64)


def test_an_image_tells_how_to_make_it_again(run, checkpoint, tmp_path):
  out = run(
    prompt=["A gâteau"],
    negative_prompt="blurry",
    seed=5,
    num_images_per_prompt=2,
    guidance_scale=3.0,
  )
  image = picture(out / "0001-a-gâteau.png")
  described = json.loads(image.text["sana_jax"])
  digest = hashlib.sha256()
  for path in sorted(checkpoint.glob("*/*.safetensors")):
    digest.update(path.read_bytes())
  assert described["checkpoint_sha256"] == digest.hexdigest()
  assert described["prompt"] == "A gâteau"
  assert described["image_index"] == 1
  assert described["guidance_scale"] == 3.0
  assert image.text["parameters"].splitlines()[:2] == [
    "A gâteau",
    "Negative prompt: blurry",
  ]
  assert (
    "Steps: 1, Sampler: FlowDPMSolver, CFG scale: 3.0, Seed: 5, Size: "
    in (image.text["parameters"])
  )
  run(
    prompt=[described["prompt"]],
    negative_prompt=described["negative_prompt"],
    seed=described["seed"],
    num_images_per_prompt=2,
    guidance_scale=described["guidance_scale"],
    output_dir=str(tmp_path / "again"),
  )
  copy = picture(tmp_path / "again" / "0001-a-gâteau.png")
  assert image.tobytes() == copy.tobytes()


def test_files_are_not_overwritten_unless_asked(run, capsys):
  out = run(prompt=["a cat"])
  before = (out / "0000-a-cat.png").read_bytes()
  assert "exists; use another" in failure(run, capsys, prompt=["a cat"], seed=1)
  assert (out / "0000-a-cat.png").read_bytes() == before
  run(prompt=["a cat"], seed=1, overwrite=True)
  assert (out / "0000-a-cat.png").read_bytes() != before


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({}, "There is no prompt"),
    ({"prompt": ["a"], "prompt_file": "nowhere.txt"}, "nowhere.txt does not"),
    ({"prompt": ["a"], "num_images_per_prompt": 0}, "must be at least 1"),
    ({"prompt": [" "]}, "prompt 0 is empty"),
    ({"prompt": ["a"], "checkpoint": "nowhere"}, "nowhere is not a directory"),
    ({"prompt": ["a"], "height": 33}, "multiples of 4"),
    ({"prompt": ["a"], "num_inference_steps": 0}, "num_inference_steps must"),
    ({"prompt": ["a"], "variant": "fp16"}, "variant 'fp16'"),
    ({"prompt": ["a"], "vae_tile": 9}, "multiples of"),
  ],
)
def test_mistakes_end_in_one_line(run, capsys, values, message):
  assert message in failure(run, capsys, **values)


def test_without_a_bundled_model_a_checkpoint_is_asked_for(
  run, capsys, monkeypatch
):
  monkeypatch.setattr(pipeline_files, "_BUNDLED", "absent")
  message = failure(run, capsys, prompt=["a"], checkpoint=None)
  assert "no bundled model" in message


def test_slugs_are_file_names():
  assert sample.slug("A  Cat, on/../the table_!") == "a-cat-on-the-table"
  assert sample.slug("🍰") == "image"
  assert len(sample.slug("word " * 50)) <= 60


@pytest.mark.slow
def test_the_script_runs_as_a_command(checkpoint, tmp_path):
  command = [sys.executable, "sample.py", f"--checkpoint={checkpoint}"]
  command += [f"--output_dir={tmp_path}", "--prompt=a cat"]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == str(tmp_path / "0000-a-cat.png")
  assert "transformer: compiled in" in done.stderr
  wrong = subprocess.run(
    [*command, "--height=3"], capture_output=True, text=True, check=False
  )
  assert wrong.returncode == 1
  assert "Traceback" not in wrong.stderr
