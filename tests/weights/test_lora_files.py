import json

import numpy as np
import pytest
import safetensors.numpy

from sana_jax.weights import lora

MODULE = "transformer_blocks.0.attn1.to_q"
OTHER = "transformer_blocks.1.attn2.to_k"


def _matrices(rng, rank=2, width=6):
  return (
    rng.normal(size=(rank, width)).astype(np.float32),
    rng.normal(size=(width, rank)).astype(np.float32),
  )


def _tensors(rng, module=MODULE, prefix="transformer.", rank=2):
  down, up = _matrices(rng, rank)
  return {
    f"{prefix}{module}.lora_A.weight": down,
    f"{prefix}{module}.lora_B.weight": up,
  }


def _write(path, tensors, settings=None):
  metadata = {"format": "pt"}
  if settings is not None:
    metadata["lora_adapter_metadata"] = json.dumps(
      {f"transformer.{name}": value for name, value in settings.items()}
    )
  safetensors.numpy.save_file(tensors, path, metadata)
  return path


def _load(tmp_path, tensors, settings=None):
  return lora.load(_write(tmp_path / "x.safetensors", tensors, settings)).pairs


def test_without_metadata_alpha_is_the_rank(tmp_path, rng):
  pairs = _load(tmp_path, _tensors(rng, rank=2) | _tensors(rng, OTHER, rank=3))
  assert {name: pair.alpha for name, pair in pairs.items()} == {
    MODULE: 2.0,
    OTHER: 3.0,
  }


@pytest.mark.parametrize("shape", [(), (1,)])
def test_alpha_tensors_are_read(tmp_path, rng, shape):
  alpha = {f"transformer.{MODULE}.alpha": np.full(shape, 7, np.float32)}
  assert _load(tmp_path, _tensors(rng) | alpha)[MODULE].alpha == 7


def test_metadata_has_patterns(tmp_path, rng):
  settings = {
    "r": 2,
    "lora_alpha": 8,
    "alpha_pattern": {"attn2.to_k": 1, f"^{MODULE}": 5},
    "rank_pattern": {"to_k": 3},
  }
  third = "transformer_blocks.1.attn1.to_q"
  tensors = _tensors(rng) | _tensors(rng, OTHER, rank=3) | _tensors(rng, third)
  pairs = _load(tmp_path, tensors, settings)
  assert {name: pair.alpha for name, pair in pairs.items()} == {
    MODULE: 5,
    OTHER: 1,
    third: 8,
  }


def test_rank_stabilised_adapters_divide_by_the_root_of_the_rank(tmp_path, rng):
  settings = {"r": 4, "lora_alpha": 8, "use_rslora": True}
  pair = _load(tmp_path, _tensors(rng, rank=4), settings)[MODULE]
  assert pair.alpha / pair.rank == 8 / np.sqrt(4)


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_names_of_older_files_are_known(tmp_path, rng, prefix):
  down, up = _matrices(rng)
  tensors = {
    f"{prefix}{MODULE}.lora.down.weight": down,
    f"{prefix}{MODULE}.lora.up.weight": up,
  }
  pair = _load(tmp_path, tensors)[MODULE]
  np.testing.assert_array_equal(pair.down, down)
  np.testing.assert_array_equal(pair.up, up)


def test_directories_of_peft_are_read(tmp_path, rng):
  _write(
    tmp_path / "adapter_model.safetensors",
    _tensors(rng, prefix="base_model.model."),
  )
  (tmp_path / "adapter_config.json").write_text(
    json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6})
  )
  assert lora.load(tmp_path).pairs[MODULE].alpha == 6


def test_everything_wrong_with_a_file_is_listed_at_once(tmp_path, rng):
  tensors = _tensors(rng)
  down, up = _matrices(rng, rank=3)
  tensors |= {
    f"transformer.{MODULE}.lora_magnitude_vector": np.ones(6, np.float32),
    f"transformer.{MODULE}.lora_B.bias": np.ones(6, np.float32),
    "transformer.scale_shift_table": np.ones((2, 6), np.float32),
    f"transformer.{OTHER}.lora_A.weight": down,
    "transformer.proj_out.lora_A.weight": down,
    "transformer.proj_out.lora_B.weight": up[:, :2],
    "proj_in.lora_A.weight": down,
    "proj_in.lora_B.weight": up,
  }
  settings = {"r": 2, "lora_alpha": 2, "use_dora": True, "peft_type": "LOHA"}
  with pytest.raises(ValueError, match="is not a LoRA that can be") as error:
    _load(tmp_path, tensors, settings)
  for part in (
    f"{MODULE}.lora_magnitude_vector belongs to DoRA",
    f"{MODULE}.lora_B.bias is the bias of an update",
    "scale_shift_table is not a LoRA tensor",
    f"{OTHER}: has 1 down (lora_A), 0 up (lora_B), 0 alpha tensors",
    "proj_out: ranks differ: lora_A has shape (3, 6), lora_B (6, 2)",
    "proj_in: its rank is 3, the metadata says 2",
    "sets use_dora=True",
    "peft_type='LOHA'",
  ):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ("alpha", "message"),
  [(None, "must be a number, got None"), (float("inf"), "must be finite")],
)
def test_an_impossible_alpha_is_an_error(tmp_path, rng, alpha, message):
  with pytest.raises(ValueError, match=f"{MODULE}: alpha {message}"):
    _load(tmp_path, _tensors(rng), {"r": 2, "lora_alpha": alpha})


def test_a_file_without_adapters_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="there are no LoRA tensors"):
    _load(tmp_path, {})


def test_broken_metadata_is_an_error(tmp_path, rng):
  path = tmp_path / "x.safetensors"
  for text in ("{", "[1]"):
    metadata = {"lora_adapter_metadata": text}
    safetensors.numpy.save_file(_tensors(rng), path, metadata)
    with pytest.raises(ValueError, match="is not a JSON object"):
      lora.load(path)


def test_a_missing_file_is_named(tmp_path):
  (tmp_path / "notes.txt").write_text("")
  with pytest.raises(FileNotFoundError, match=r"found \['notes.txt'\]"):
    lora.load(tmp_path)
  with pytest.raises(FileNotFoundError, match="nowhere has no LoRA"):
    lora.load(tmp_path / "nowhere")
