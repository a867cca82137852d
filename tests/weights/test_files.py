"""Weights are found under every published name, and broken files are named."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sana_jax.weights import files


@pytest.fixture
def tensors(rng):
  return {
    "a": rng.normal(size=(3, 4)).astype(np.float32),
    "b": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
    "c": rng.normal(size=(2, 2)).astype(np.float16),
    "d": np.arange(6),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3, np.float32),
  }


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, tensor in expected.items():
    array = np.asarray(found[name])
    assert array.dtype == tensor.dtype
    assert found[name].shape == tensor.shape
    np.testing.assert_array_equal(array, tensor)


def write(path, tensors):
  path.write_bytes(safetensors.numpy.save(tensors))


def test_safetensors_of_all_dtypes_are_read(tmp_path, tensors):
  write(tmp_path / "x.safetensors", tensors)
  assert_same(files.open_safetensors(tmp_path / "x.safetensors"), tensors)


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "model"])
@pytest.mark.parametrize("limit", [10**9, 30])
def test_components_are_written_and_read_whole_or_split(
  tmp_path, tensors, stem, limit
):
  files.write_component(
    tmp_path, {"depth": 2}, tensors, stem=stem, max_shard_bytes=limit
  )
  assert_same(files.open_component(tmp_path), tensors)
  assert files.read_json(tmp_path / "config.json") == {"depth": 2}
  count = len(list(tmp_path.glob("*.safetensors")))
  assert (count > 1) == (limit == 30)
  assert (tmp_path / f"{stem}.safetensors.index.json").exists() == (count > 1)


def index(tmp_path, name, weight_map):
  (tmp_path / name).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
  "shard",
  [
    "diffusion_pytorch_model.bf16-00001-of-00002.safetensors",
    "diffusion_pytorch_model-00001-of-00002.bf16.safetensors",
  ],
)
def test_both_namings_of_variant_shards_are_read(tmp_path, tensors, shard):
  other = shard.replace("00001", "00002", 1)
  first = {"a": tensors["a"]}
  second = {"b": tensors["b"]}
  write(tmp_path / shard, first)
  write(tmp_path / other, second)
  index(
    tmp_path,
    "diffusion_pytorch_model.safetensors.index.bf16.json",
    {"a": shard, "b": other},
  )
  assert files.variants(tmp_path) == {"bf16"}
  for variant in ("bf16", None):
    found = files.open_component(tmp_path, variant=variant)
    assert_same(found, first | second)


def test_the_plain_weights_win_over_variants_unless_asked(tmp_path, tensors):
  write(tmp_path / "model.safetensors", {"a": tensors["a"]})
  write(tmp_path / "model.fp16.safetensors", {"c": tensors["c"]})
  assert set(files.open_component(tmp_path)) == {"a"}
  assert set(files.open_component(tmp_path, variant="fp16")) == {"c"}
  with pytest.raises(FileNotFoundError, match="of variant 'bf16'"):
    files.open_component(tmp_path, variant="bf16")


def test_several_variants_need_a_choice(tmp_path, tensors):
  for variant in ("fp16", "bf16"):
    write(tmp_path / f"model.{variant}.safetensors", tensors)
  with pytest.raises(ValueError, match=r"\['bf16', 'fp16'\]; choose one"):
    files.open_component(tmp_path)


def test_missing_directories_and_weights_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
    files.open_component(tmp_path / "nowhere")
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(FileNotFoundError, match=r"no safetensors.*config\.json"):
    files.open_component(tmp_path)


@pytest.mark.parametrize("name", ["../evil.safetensors", "weights.bin"])
def test_an_index_may_name_only_files_beside_it(tmp_path, name):
  index(tmp_path, "model.safetensors.index.json", {"a": name})
  with pytest.raises(ValueError, match="beside it"):
    files.open_component(tmp_path)


def test_missing_shards_and_maps_are_named(tmp_path):
  name = "model.safetensors.index.json"
  index(tmp_path, name, {"a": "model-00001-of-00002.safetensors"})
  with pytest.raises(FileNotFoundError, match="lacks .*00001-of-00002"):
    files.open_component(tmp_path)
  (tmp_path / name).write_text("{}")
  with pytest.raises(ValueError, match="has no weight_map"):
    files.open_component(tmp_path)


@pytest.mark.parametrize("kept", [0, 5, 50, -1])
def test_truncated_files_are_recognised_without_reading_values(
  tmp_path, tensors, kept
):
  path = tmp_path / "x.safetensors"
  write(path, tensors)
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(ValueError, match="not a complete safetensors file"):
    files.open_safetensors(path)


@pytest.mark.parametrize(
  "entry",
  [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]},
    {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]},
    {"shape": [1]},
    [1],
  ],
)
def test_contradictory_headers_are_refused(tmp_path, entry):
  header = json.dumps({"a": entry}).encode()
  path = tmp_path / "x.safetensors"
  path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
  with pytest.raises(ValueError, match="not a complete safetensors file"):
    files.open_safetensors(path)


def test_an_html_page_is_not_a_safetensors_file(tmp_path):
  path = tmp_path / "x.safetensors"
  path.write_text("<!DOCTYPE html><html>not found</html>")
  with pytest.raises(ValueError, match="download it again"):
    files.open_safetensors(path)


def test_json_errors_name_the_file(tmp_path):
  path = tmp_path / "config.json"
  with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
    files.read_json(path)
  path.write_text("{")
  with pytest.raises(ValueError, match="not valid JSON"):
    files.read_json(path)
  path.write_text("[]")
  with pytest.raises(ValueError, match="holds a JSON list"):
    files.read_json(path)


@pytest.mark.parametrize("limit", [10**9, 30])
def test_weights_are_identified_by_the_bytes_of_their_files(
  tmp_path, tensors, limit
):
  files.write_component(tmp_path, {}, tensors, max_shard_bytes=limit)
  content = b"".join(
    path.read_bytes() for path in sorted(tmp_path.glob("*.safetensors"))
  )
  expected = hashlib.sha256(content).hexdigest()
  assert files.weights_sha256(tmp_path) == expected
  (tmp_path / "config.json").write_text("{}")
  assert files.weights_sha256(tmp_path) == expected
