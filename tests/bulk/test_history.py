"""A restart keeps the decisions of the beginning, whatever is free by now."""

import dataclasses
import json
import re
import time

import pytest

from sana_jax import storage
from sana_jax.bulk import decodings, history, job, requests
from sana_jax.models import windows
from sana_jax.pipeline import memory
from tests import tiny

DESCRIPTION = {
  "solver": "x",
  "checkpoint": "c",
  "checkpoint_sha256": "ab",
  "sana_jax": "0",
}
ITEMS = [
  requests.Request("f", i, f"prompt {i}", settings=(("height", 64),))
  for i in range(1, 4)
]
NUMBERS = {"seed": 0, "batch_size": 1, "images_per_unit": 1}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(path)
  return path


@pytest.fixture
def pipe(tokenizer):
  # A decoder that needs more than the transformer.
  autoencoder = dataclasses.replace(
    tiny.autoencoder_config(), decoder_block_out_channels=(32, 32, 64)
  )
  made = tiny.make_pipeline(tokenizer, autoencoder=autoencoder)
  made.memory = memory.Policy(tile_sides=(32,))
  settings = made.generation_config
  made.generation_config = settings.replace({"num_inference_steps": 1})
  return made


def peak(pipe) -> int:
  """Returns what the images need when they are decoded whole."""
  history.fix_memory(pipe, None)
  plan = decodings.Decodings(pipe).plan({"height": 64}, 1)
  assert plan.decoding.tiling is None
  return plan.peak


def make(pipe, path, available=None):
  output = job.Output(path=path)
  prepared = job.prepare(pipe, ITEMS, output, **NUMBERS)
  if available is not None:
    history.fix_memory(pipe, available)
    prepared = prepared._replace(available_bytes=available)
  job.make(pipe, prepared, output, DESCRIPTION, time.monotonic())
  return prepared


@pytest.mark.filterwarnings("ignore:64x32")
def test_a_restart_decodes_as_the_run_began(pipe, tmp_path):
  little = peak(pipe) - 1
  make(pipe, tmp_path, little)
  before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
  lines = [json.loads(t) for t in before["manifest.jsonl"].splitlines()]
  assert {line["tiling"]["tile_height"] for line in lines} == {32}
  assert json.loads(before["run.json"])["available_bytes"] == little
  (tmp_path / "0001-prompt-2.png").unlink()
  pipe.memory = memory.Policy(tile_sides=(32,))
  again = make(pipe, tmp_path)
  assert again.available_bytes == little
  assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_restart_with_too_little_memory_is_refused(pipe):
  ways = decodings.Decodings(pipe)
  history.fix_memory(pipe, None)
  kinds = history.make_plan(ITEMS, ways.check, None, **NUMBERS).kinds()
  needed = ways.plan({"height": 64}, 1).peak
  ways.check_free(kinds, needed)
  ways.check_free(kinds, None)
  with pytest.raises(ValueError, match="began with more free memory"):
    ways.check_free(kinds, needed - 1)


def test_what_was_whole_is_not_made_in_tiles(pipe):
  little = peak(pipe) - 1
  described = {"tiling": None}
  decodings.prescribe(pipe, described)
  history.fix_memory(pipe, little)
  ways = decodings.Decodings(pipe)
  images = history.make_plan(ITEMS[:1], ways.check, None, **NUMBERS)
  with pytest.raises(
    ValueError, match=r"f was decoded whole, not in tiles: .* --vae_window it "
  ):
    decodings.check_prescribed(ways, images, described)
  decodings.check_prescribed(ways, images, {})


def test_what_was_whole_is_said_to_be_made_in_windows(pipe, caplog):
  little = peak(pipe) - 1
  pipe.memory = memory.Policy(window_sides=(16,))

  def say(available, description):
    caplog.clear()
    decodings.prescribe(pipe, description)
    history.fix_memory(pipe, available)
    ways = decodings.Decodings(pipe)
    images = history.make_plan(ITEMS[:1], ways.check, None, **NUMBERS)
    decodings.check_prescribed(ways, images, description)
    return caplog.text

  with caplog.at_level("WARNING", "absl"):
    assert "in windows of 16x16 now" in say(little, {"tiling": None})
    assert not say(little, {})
    assert not say(None, {"tiling": None})


def test_memory_that_nobody_knows_is_no_number(pipe):
  history.fix_memory(pipe, None)
  plan = decodings.Decodings(pipe).plan({"height": 64}, 1)
  assert plan.available is None
  assert "of an unknown amount" in plan.reason


def test_windows_are_said_and_prescribed(pipe):
  cut = windows.Windows(window_side=16)
  pipe.tiling = cut
  plan = decodings.Decodings(pipe).plan({"height": 64}, 1)
  described = {"tiling": decodings.describe(plan.decoding.cut)}
  assert described == {"tiling": {"window_side": 16}}
  pipe.tiling = None
  decodings.prescribe(pipe, json.loads(json.dumps(described)))
  assert pipe.tiling == cut


def test_a_strange_tiling_is_refused(pipe):
  with pytest.raises(ValueError, match=re.escape("{'side': 3}, which is no")):
    decodings.prescribe(pipe, {"tiling": {"side": 3}})
  with pytest.raises(ValueError, match="is 3, which is no"):
    decodings.prescribe(pipe, {"tiling": 3})


@pytest.mark.filterwarnings("ignore:Outside")
def test_lines_that_do_not_fit_are_left_out_and_keep_their_room(pipe):
  history.fix_memory(pipe, 4 * peak(pipe))
  large = dataclasses.replace(
    ITEMS[0], line=9, count=3, settings=(("height", 640), ("width", 640))
  )
  items = [ITEMS[0], large, ITEMS[1]]
  ways = decodings.Decodings(pipe)
  images = history.make_plan(items, ways.check, None, **NUMBERS)
  (problem,) = images.problems
  assert "f:9: 1 image(s) of 640x640 per device do not fit" in str(problem)
  assert [image.index for image in images.images()] == [0, 4]
  assert history.start(images, 7)["left_out"] == [
    {"item": 1, "images": 3, "origin": "f", "line": 9}
    | {"error": problem.reason}
  ]


def test_hosts_that_begin_together_agree(tmp_path):
  first, second = (storage.Directory(tmp_path, host) for host in range(2))
  assert first.create("run.json", b"1")
  assert not second.create("run.json", b"2")
  assert (tmp_path / "run.json").read_bytes() == b"1"
  assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
