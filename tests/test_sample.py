"""sample.py writes pictures that know their origin, and fails in one line."""

import hashlib
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from absl import flags
from absl.testing import flagsaver

import sample
from sana_jax import pipeline as pipeline_lib
from sana_jax.bulk import loading
from sana_jax.pipeline import execution
from sana_jax.pipeline import files as pipeline_files
from sana_jax.weights import components, lora
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

  def call(code=0, **values):
    defaults = {
      "checkpoint": str(checkpoint),
      "output_dir": str(tmp_path / "out"),
      # --reproduce takes none.
      "num_inference_steps": None if "reproduce" in values else 1,
    }
    with flagsaver.flagsaver(**defaults | values):
      assert sample.main(["sample.py"]) == code
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


def test_a_stage_that_runs_out_of_memory_is_explained_by_flags(
  run, capsys, monkeypatch
):
  def decode(*args, **kwargs):
    raise execution.StageMemoryError("decoder", "RESOURCE_EXHAUSTED: much")

  monkeypatch.setattr(pipeline_lib.SanaPipeline, "_decode", decode)
  with pytest.raises(SystemExit) as error:
    run(prompt=["a red apple"])
  assert error.value.code == 1
  said = capsys.readouterr().err
  assert "sample.py: Out of device memory in the decoder, against" in said
  assert "  1. fewer images at a time: --batch_size\n" in said
  assert said.endswith("XLA: RESOURCE_EXHAUSTED: much\n")


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
  message = failure(run, capsys, prompt=["a cat"], seed=1)
  assert "holds another run" in message
  assert "seed was 0, is 1" in message
  assert (out / "0000-a-cat.png").read_bytes() == before
  run(prompt=["a cat"], seed=1, overwrite=True)
  assert (out / "0000-a-cat.png").read_bytes() != before
  (out / "run.json").unlink()
  assert "exists; use another" in failure(run, capsys, prompt=["a cat"])


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({}, "There is no prompt"),
    ({"prompt": ["a"], "prompt_file": "nowhere.txt"}, "nowhere.txt does not"),
    ({"prompt": ["a"], "num_images_per_prompt": 0}, "must be at least 1"),
    ({"prompt": [" "]}, "--prompt=' ': the prompt is empty"),
    ({"prompt": ["a"], "num_hosts": 2}, "--num_hosts and --host_index go"),
    ({"prompt": ["a"], "num_hosts": 2, "host_index": 2}, "got 2 of 2"),
    ({"prompt": ["a"], "guidance_interval": "1"}, "2 numbers, got '1'"),
    ({"prompt": ["a"], "image": ""}, "image: expected the path of a picture"),
    ({"prompt": ["a"], "pag_scale": 1.0, "pag_applied_layers": "9"}, "blocks"),
    ({"prompt": ["a"], "strength": 0.5}, "strength has no effect"),
    ({"prompt": ["a"], "image": "nowhere.png"}, "cannot read nowhere.png"),
    ({"prompt": ["a"], "batch_size": 0}, "must be at least 1"),
    ({"prompt": ["a"], "seed": -1}, "seed must be in"),
    ({"prompt": ["a"], "grid": True, "output_format": "webdataset"}, "--grid"),
    (
      {"prompt": ["a"], "reproduce": "a.png", "seed": 3, "height": 64}
      | {"batch_size": 2, "num_images_per_prompt": 2, "image": "b.png"},
      "from the image; leave --prompt, --seed, --num_images_per_prompt, "
      "--batch_size, --image, --height out",
    ),
    ({"prompt": ["a"], "images_per_shard": 5}, "no effect on PNG files"),
    (
      {"prompt": ["a"], "distributed": True, "num_hosts": 2, "host_index": 0},
      "--distributed numbers the machines itself",
    ),
    ({"reproduce": "nowhere.png"}, "nowhere.png"),
    ({"prompt": ["a"], "fuse_lora": True}, "--fuse_lora has no effect"),
    ({"prompt": ["a"], "lora_scale": [1.0]}, "--lora_scale has no effect"),
    (
      {"prompt": ["a"], "controlnet_wiring": "original"},
      "--controlnet_wiring has no effect without --controlnet",
    ),
    ({"prompt": ["a"], "controlnet": "nowhere"}, "nowhere"),
    ({"prompt": ["a"], "lora": ["nowhere"]}, "nowhere"),
    ({"prompt": ["a"], "step": 5}, "step= is for work directories"),
    ({"prompt": ["a"], "components": "x"}, "components= is for a"),
    (
      {"prompt": ["a"], "lora": ["a"], "lora_scale": [1.0] * 2},
      "there are 2 --lora_scale for 1 --lora;",
    ),
    (
      {"prompt": ["a"], "controlnet_conditioning_scale": 0.5},
      "there is no control_image",
    ),
    ({"prompt": ["a"], "best_of": 2}, "--best_of and --scorer go together"),
    (
      {"prompt": ["a"], "best_of": 0, "scorer": "math:hypot"},
      "must be at least",
    ),
    ({"prompt": ["a"], "best_of": 2, "scorer": "math"}, '"module:function"'),
    ({"prompt": ["a"], "best_of": 2, "scorer": "no_such:f"}, "no_such"),
    ({"prompt": ["a"], "best_of": 2, "scorer": "math:pi"}, "is no function"),
    ({"prompt": ["a"], "checkpoint": "nowhere"}, "nowhere does not exist"),
    (
      {"prompt": ["a"], "height": 33},
      "height 33 must be a positive multiple of 4",
    ),
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


def test_the_same_command_makes_what_is_missing(run, caplog, capsys):
  values = {"prompt": ["a", "b", "c"], "batch_size": 1, "grid": True}
  out = run(**values)
  before = {path.name: path.read_bytes() for path in out.iterdir()}
  (out / "0001-b.png").unlink()
  capsys.readouterr()
  with caplog.at_level("INFO", "absl"):
    run(**values)
  assert "2 of 3 images are there already" in caplog.text
  assert {p.name: p.read_bytes() for p in out.iterdir()} == before
  assert capsys.readouterr().out.split() == [
    str(out / "0001-b.png"),
    str(out / "grid.png"),
  ]


def test_lines_change_settings_and_bad_lines_are_left_out(
  run, tmp_path, caplog
):
  file = tmp_path / "a.jsonl"
  lines = [
    {"prompt": "a", "height": 16, "seed": 7, "num_images_per_prompt": 2},
    {"prompt": "b", "height": 17},
    {"prompt": "c", "sed": 1},
    {"prompt": "d"},
  ]
  file.write_text("\n".join(map(json.dumps, lines)))
  with caplog.at_level("ERROR", "absl"):
    out = run(code=3, prompt_file=str(file), num_images_per_prompt=1)
  assert f"left out: {file}:2: height 17 must be" in caplog.text
  assert f"left out: {file}:3: unknown fields ['sed']" in caplog.text
  assert "requests left out: 2" in caplog.text
  names = ["0000-a.png", "0001-a.png", "0004-d.png"]
  assert sorted(p.name for p in out.glob("*.png")) == names
  assert picture(out / names[1]).size == (32, 16)
  first, second, third = (
    json.loads(picture(out / name).text["sana_jax"]) for name in names
  )
  assert [d["seed"] for d in (first, second, third)] == [7, 7, 0]
  assert [d["image_index"] for d in (first, second, third)] == [0, 1, 4]


def write_lines(path, *lines):
  texts = [
    line if isinstance(line, str) else json.dumps(line) for line in lines
  ]
  path.write_text("\n".join(texts))
  return str(path)


def files_of(directory) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_no_line_ends_a_run(run, tmp_path, caplog):
  bad = {
    2: ({"prompt": "a", "guidance_interval": [0.1]}, "expected 2 numbers"),
    3: ('{"prompt": "lone \\ud83d surrogate"}', "half of a surrogate pair"),
    4: (
      {"prompt": "a", "negative_prompt": "\ud83d"},
      r"negative_prompt is no valid text: it has half of a surrogate pair, "
      r"'\ud83d', at position 0",
    ),
    5: ({"prompt": "a", "height": 4096, "width": 40_000_000}, "do not fit"),
    6: ({"prompt": "a", "height": 32}, "have no effect on"),
  }
  lines = [{"prompt": "good"}, *(line for line, _ in bad.values())]
  file = write_lines(tmp_path / "a.jsonl", *lines, {"prompt": "last"})
  with caplog.at_level("ERROR", "absl"):
    out = run(code=3, prompt_file=file, height=64, vae_tile=32)
  for number, (_, reason) in bad.items():
    (message,) = (
      r.message for r in caplog.records if f"{file}:{number}:" in r.message
    )
    assert reason in message
  names = [path.name for path in sorted(out.glob("*.png"))]
  assert names == ["0000-good.png", "0006-last.png"]


def test_what_failed_is_tried_again(run, tmp_path):
  PIL.Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
  file = write_lines(
    tmp_path / "a.jsonl",
    {"prompt": "a", "image": str(tmp_path / "a.png")},
    {"prompt": "b"},
  )
  out = run(prompt_file=file)
  whole = files_of(out)
  # As after a failure: a line that says so, and no file.
  (out / "0000-a.png").unlink()
  first, second = (out / "manifest.jsonl").read_text().splitlines()
  described = json.loads(first)
  error = {"index": described["index"], "error": "lost"}
  (out / "manifest.jsonl").write_text(f"{json.dumps(error)}\n{second}\n")
  run(prompt_file=file)
  assert files_of(out) == whole


@pytest.mark.slow
def test_mending_a_line_makes_its_images_and_changes_no_other(
  run, tmp_path, capsys
):
  good = [
    {"prompt": "a"},
    {"prompt": "b", "height": 17, "num_images_per_prompt": 2},
    '{"prompt": ',
    {"prompt": "d"},
  ]
  file = write_lines(tmp_path / "a.jsonl", *good)
  out = run(code=3, prompt_file=file)
  before = files_of(out)
  assert "0004-d.png" in before
  good[1] |= {"height": 16}
  write_lines(tmp_path / "a.jsonl", *good)
  run(code=3, prompt_file=file)
  good[2] = {"prompt": "c", "height": 16}
  write_lines(tmp_path / "a.jsonl", *good)
  capsys.readouterr()
  run(prompt_file=file)
  assert capsys.readouterr().out.split() == [str(out / "0003-c.png")]
  after = files_of(out)
  added = {"0001-b.png", "0002-b.png", "0003-c.png"}
  assert after.keys() == before.keys() | added
  for name, content in before.items():
    if name.endswith(".png"):
      assert after[name] == content
  assert after["manifest.jsonl"].startswith(before["manifest.jsonl"])
  # A run of the mended file alone numbers and draws them alike.
  run(prompt_file=file, output_dir=str(tmp_path / "all"))
  for name in added | {"0000-a.png", "0004-d.png"}:
    ours, theirs = (
      np.asarray(picture(directory / name), np.int64)
      for directory in (out, tmp_path / "all")
    )
    assert np.abs(ours - theirs).max() <= 1
  for number, change, message in (
    (0, {"prompt": "A"}, "requests_sha256 was"),
    (1, {"prompt": "B"}, "mended have changed since"),
    (1, {"num_images_per_prompt": 3}, "left room for 2 image(s)"),
  ):
    changed = list(good)
    changed[number] = good[number] | change
    write_lines(tmp_path / "a.jsonl", *changed)
    assert message in failure(run, capsys, prompt_file=file)


@pytest.mark.parametrize("output_format", ["webdataset", "arrayrecord"])
def test_shards_of_mended_lines_have_names_of_their_own(
  run, tmp_path, output_format
):
  file = write_lines(
    tmp_path / "a.jsonl", {"prompt": "a"}, "{", {"prompt": "c"}
  )
  values = {"prompt_file": file, "output_format": output_format}
  out = run(code=3, **values)
  before = files_of(out)
  write_lines(tmp_path / "a.jsonl", *({"prompt": p} for p in "abc"))
  run(**values)
  after = files_of(out)
  (added,) = after.keys() - before.keys()
  assert added.startswith("repaired-1-00000-of-00001.")
  (shard,) = (name for name in before if name.startswith("images-"))
  assert after[shard] == before[shard]
  lines = after["manifest.jsonl"].decode().splitlines()
  assert [json.loads(line)["index"] for line in lines] == [0, 2, 1]


def test_batches_that_fail_are_named_and_the_rest_goes_on(
  run, tmp_path, caplog
):
  file = tmp_path / "a.jsonl"
  lines = [{"prompt": "a", "guidance_scale": 1e38}, {"prompt": "b"}]
  file.write_text("\n".join(map(json.dumps, lines)))
  with caplog.at_level("ERROR", "absl"):
    out = run(code=3, prompt_file=str(file), grid=True)
  assert "images [0] failed: The decoder's result is not finite" in caplog.text
  assert "1 images failed: [0]" in caplog.text
  lines = (out / "manifest.jsonl").read_text().splitlines()
  assert "not finite" in json.loads(lines[0])["error"]
  assert sorted(p.name for p in out.glob("*.png")) == ["0001-b.png", "grid.png"]
  # What failed is remembered, and white.
  run(code=3, prompt_file=str(file), grid=True)
  assert np.asarray(picture(out / "grid.png"))[:32, :32].min() == 255


def test_an_image_is_made_again_from_itself(run, tmp_path, caplog):
  out = run(
    prompt=["a cat", "a dog"],
    negative_prompt="blurry",
    seed=5,
    guidance_scale=3.0,
    guidance_interval="0.1,0.9",
    height=64,
    vae_tile=32,
    offload_text_encoder=True,
    batch_size=1,
  )
  path = out / "0001-a-dog.png"
  with caplog.at_level("WARNING", "absl"):
    run(
      reproduce=str(path),
      output_dir=str(tmp_path / "again"),
      num_inference_steps=None,
    )
  assert "differently" not in caplog.text
  copy = picture(tmp_path / "again" / "0000-a-dog.png")
  assert copy.tobytes() == picture(path).tobytes()
  assert copy.text == picture(path).text


def test_an_image_of_another_model_asks_for_it(run, checkpoint, capsys):
  path = run(prompt=["a cat"]) / "0000-a-cat.png"
  message = failure(run, capsys, reproduce=str(path), checkpoint=None)
  assert f"made with the checkpoint {checkpoint.name!r}, not with" in message
  assert "give it as --checkpoint" in message


def save_described(source, target, described):
  info = PIL.PngImagePlugin.PngInfo()
  info.add_itxt("sana_jax", json.dumps(described))
  picture(source).save(target, pnginfo=info)


def test_an_image_is_decoded_again_as_it_was(run, tmp_path):
  out = run(prompt=["a cat"], batch_size=1, height=64, vae_tile=32)
  path = out / "0000-a-cat.png"
  described = json.loads(picture(path).text["sana_jax"])
  tiles = {"tile_height": 32, "tile_width": 32}
  strides = {"stride_height": 28, "stride_width": 28}
  assert described["tiling"] == tiles | strides
  line = json.loads((out / "manifest.jsonl").read_text())
  assert line["tiling"] == tiles | strides
  # As if the tiles had been chosen for lack of memory.
  del described["vae_tile"]
  save_described(path, tmp_path / "a.png", described)
  run(reproduce=str(tmp_path / "a.png"), output_dir=str(tmp_path / "again"))
  copy = picture(tmp_path / "again" / "0000-a-cat.png")
  assert copy.tobytes() == picture(path).tobytes()
  run(
    prompt=["a cat"],
    batch_size=1,
    height=64,
    output_dir=str(tmp_path / "whole"),
  )
  whole = picture(tmp_path / "whole" / "0000-a-cat.png")
  assert json.loads(whole.text["sana_jax"])["tiling"] is None
  assert whole.tobytes() != copy.tobytes()


def test_an_image_of_a_larger_batch_is_made_again_within_one_level(
  run, tmp_path
):
  out = run(prompt=["a cat", "a dog", "a cow"], num_inference_steps=3)
  run(reproduce=str(out / "0002-a-cow.png"), output_dir=str(tmp_path / "again"))
  ours, theirs = (
    np.asarray(picture(path), np.int64)
    for path in (out / "0002-a-cow.png", tmp_path / "again/0000-a-cow.png")
  )
  assert np.abs(ours - theirs).max() <= 1


def test_an_image_made_beside_a_longer_prompt_is_made_again(run, tmp_path):
  prompts = tmp_path / "prompts.jsonl"
  lines = [
    {"prompt": prompt, "max_sequence_length": 80}
    for prompt in ("a cat", "dogs and 1 mouse " * 9)
  ]
  prompts.write_text("\n".join(map(json.dumps, lines)))
  out = run(prompt_file=str(prompts), batch_size=2)
  path = out / "0000-a-cat.png"
  run(reproduce=str(path), output_dir=str(tmp_path / "again"))
  copy = tmp_path / "again" / "0000-a-cat.png"
  for image in (path, copy):
    # Left to itself, it would be made with 64.
    assert json.loads(picture(image).text["sana_jax"])["text_length"] == 80
  ours, theirs = (np.asarray(picture(p), np.int64) for p in (path, copy))
  # Batches of two and of one.
  assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("length", [0, -1, "64", 64.0, True])
def test_an_image_with_an_impossible_text_length_is_refused(
  run, capsys, tmp_path, length
):
  path = run(prompt=["a cat"], batch_size=1) / "0000-a-cat.png"
  described = json.loads(picture(path).text["sana_jax"])
  described["text_length"] = length
  save_described(path, tmp_path / "a.png", described)
  message = failure(run, capsys, reproduce=str(tmp_path / "a.png"))
  assert f"text_length is {length!r}" in message


def test_an_image_made_again_otherwise_warns(run, tmp_path, caplog):
  out = run(prompt=["a cat"], batch_size=1)
  original = picture(out / "0000-a-cat.png")
  info = PIL.PngImagePlugin.PngInfo()
  described = json.loads(original.text["sana_jax"]) | {"jax": "0.0.1"}
  info.add_itxt("sana_jax", json.dumps(described))
  original.save(tmp_path / "older.png", pnginfo=info)
  with caplog.at_level("WARNING", "absl"):
    run(reproduce=str(tmp_path / "older.png"), output_dir=str(tmp_path / "b"))
  assert "differently: this is another version of JAX: jax was 0.0.1" in (
    caplog.text
  )


def test_given_flags_win_over_those_an_image_was_made_with(run):
  described = {"dtype": "bfloat16", "vae_tile": 64, "prompt": "a"}
  assert sample.loading_options(described).dtype == "bfloat16"
  flags.FLAGS["dtype"].parse("float32")
  flags.FLAGS["dtype"].present = 1
  try:
    found = sample.loading_options(described)
    assert found == loading.Loading(dtype="float32", vae_tile=64)
  finally:
    flags.FLAGS["dtype"].unparse()


def test_windows_that_are_given_win_over_an_images_tiles(run):
  flags.FLAGS["vae_window"].parse("32")
  flags.FLAGS["vae_window"].present = 1
  try:
    found = sample.loading_options({"vae_tile": 64})
    assert found == loading.Loading(vae_window=32)
  finally:
    flags.FLAGS["vae_window"].unparse()


def test_an_image_in_windows_is_the_whole_and_is_made_again(run, tmp_path):
  common = {"prompt": ["a cat"], "batch_size": 1, "height": 64}
  path = run(**common, vae_window=16) / "0000-a-cat.png"
  described = json.loads(picture(path).text["sana_jax"])
  assert described["tiling"] == {"window_side": 16}
  run(reproduce=str(path), output_dir=str(tmp_path / "again"))
  again = picture(tmp_path / "again" / "0000-a-cat.png")
  assert again.tobytes() == picture(path).tobytes()
  run(**common, output_dir=str(tmp_path / "whole"))
  whole = picture(tmp_path / "whole" / "0000-a-cat.png")
  levels = [np.asarray(p).astype(int) for p in (whole, picture(path))]
  assert np.abs(levels[0] - levels[1]).max() <= 1


def test_images_begin_with_an_image_of_a_flag_or_a_line(run, tmp_path):
  rng = np.random.default_rng(0)
  for name, size in (("a.png", (40, 20)), ("b.png", (32, 32))):
    pixels = rng.integers(0, 256, (*size[::-1], 3), np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / name)
  mask = np.zeros((20, 40), np.uint8)
  mask[:, 20:] = 255
  PIL.Image.fromarray(mask).save(tmp_path / "mask.png")
  file = tmp_path / "a.jsonl"
  lines = [
    {"prompt": "left"},
    {"prompt": "right", "mask_image": str(tmp_path / "mask.png")},
    {"prompt": "other", "image": str(tmp_path / "b.png")},
    {"prompt": "bad", "image": str(tmp_path / "b.png")}
    | {"mask_image": str(tmp_path / "mask.png")},
  ]
  file.write_text("\n".join(map(json.dumps, lines)))
  out = run(
    code=3,
    prompt_file=str(file),
    image=str(tmp_path / "a.png"),
    num_inference_steps=2,
  )
  left, right = picture(out / "0000-left.png"), picture(out / "0001-right.png")
  assert left.size == right.size
  assert left.size[0] > left.size[1]
  assert picture(out / "0002-other.png").size == (32, 32)
  assert not (out / "0003-bad.png").exists()
  described = json.loads(right.text["sana_jax"])
  digest = hashlib.sha256((tmp_path / "mask.png").read_bytes()).hexdigest()
  assert described["mask_image_sha256"] == digest
  run(
    reproduce=str(out / "0001-right.png"),
    output_dir=str(tmp_path / "again"),
    num_inference_steps=None,
  )
  copy = picture(tmp_path / "again" / "0000-right.png")
  assert copy.tobytes() == right.tobytes()


@pytest.mark.slow
def test_adapters_and_a_controlnet_steer_and_are_remembered(
  run, tmp_path, checkpoint, capsys, caplog
):
  steered = tiny.make_pipeline(checkpoint / "tokenizer", controlnet=True)
  components.save_controlnet(
    tmp_path / "controlnet", steered.controlnet, steered.controlnet_config
  )
  rng = np.random.default_rng(0)
  for file in ("a", "b"):
    pair = lora.Pair(
      rng.normal(size=(2, 16)).astype(np.float32),
      rng.normal(size=(16, 2)).astype(np.float32),
      2.0,
    )
    adapter = lora.Lora({"transformer_blocks.0.attn1.to_q": pair})
    lora.save(tmp_path / f"{file}.safetensors", adapter)
  pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
  PIL.Image.fromarray(pixels).save(tmp_path / "edges.png")
  values = {
    "prompt": ["a cat"],
    "batch_size": 1,
    "lora": [str(tmp_path / f"{file}.safetensors") for file in "ab"],
    "lora_scale": [0.5, 0.25],
    "controlnet": str(tmp_path / "controlnet"),
    "control_image": str(tmp_path / "edges.png"),
    "controlnet_conditioning_scale": 0.5,
  }
  made = picture(run(**values) / "0000-a-cat.png")
  run(
    reproduce=str(tmp_path / "out" / "0000-a-cat.png"),
    output_dir=str(tmp_path / "again"),
  )
  copy = picture(tmp_path / "again" / "0000-a-cat.png")
  assert made.tobytes() == copy.tobytes()
  assert made.text == copy.text
  # Another adapter, under the same name.
  lora.save(
    tmp_path / "b.safetensors",
    lora.Lora({"transformer_blocks.1.attn1.to_q": pair}),
  )
  assert "lora_sha256 was" in failure(run, capsys, **values)
  with caplog.at_level("WARNING", "absl"):
    run(
      reproduce=str(tmp_path / "out" / "0000-a-cat.png"),
      output_dir=str(tmp_path / "other"),
    )
  assert "differently: --lora is another" in caplog.text
  no_control = {
    "controlnet": None,
    "control_image": None,
    "controlnet_conditioning_scale": None,
  }
  for i, change in enumerate(({"lora_scale": [2.0]}, no_control)):
    run(**values | change | {"output_dir": str(tmp_path / str(i))})
    changed = picture(tmp_path / str(i) / "0000-a-cat.png")
    assert changed.tobytes() != made.tobytes()


def brightness(images, prompts):
  assert len(images) == len(prompts)
  return images.mean(axis=(1, 2, 3))


def test_the_best_of_several_is_kept_and_made_again(run, tmp_path):
  out = run(
    prompt=["a cat", "a dog"], best_of=3, scorer="tests.test_sample:brightness"
  )
  run(
    prompt=["a cat", "a dog"],
    num_images_per_prompt=3,
    batch_size=3,
    output_dir=str(tmp_path / "all"),
  )
  scores = [
    np.asarray(picture(path)).mean()
    for path in sorted((tmp_path / "all").glob("*.png"))
  ]
  winner = 3 + int(np.argmax(scores[3:]))
  best = picture(out / "0001-a-dog.png")
  described = json.loads(best.text["sana_jax"])
  assert described["image_index"] == winner
  assert described["best_of"] == 3
  assert described["score"] * 255 == pytest.approx(scores[winner], abs=0.5)
  kept = picture(tmp_path / "all" / f"{winner:04d}-a-dog.png")
  assert best.tobytes() == kept.tobytes()
  run(reproduce=str(out / "0001-a-dog.png"), output_dir=str(tmp_path / "again"))
  copy = picture(tmp_path / "again" / "0000-a-dog.png")
  assert copy.tobytes() == best.tobytes()


@pytest.mark.parametrize("output_format", ["webdataset", "arrayrecord"])
def test_shards_hold_so_many_images(run, output_format, capsys):
  out = run(
    prompt=["a", "b", "c"],
    num_images_per_prompt=2,
    batch_size=2,
    output_format=output_format,
    images_per_shard=4,
  )
  names = sorted(path.name for path in out.glob("images-*"))
  assert [name.split(".")[0] for name in names] == [
    "images-00000-of-00002",
    "images-00001-of-00002",
  ]
  lines = (out / "manifest.jsonl").read_text().splitlines()
  lines = [json.loads(line) for line in lines]
  assert [line["file"] for line in lines] == [names[0]] * 4 + [names[1]] * 2
  assert [line["key"] for line in lines] == [f"{i:08d}" for i in range(6)]
  assert capsys.readouterr().out.split() == [str(out / name) for name in names]


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
