"""A checkpoint is known by the files that are read."""

import hashlib

import pytest
from etils import epath

from sana_jax.bulk import loading
from sana_jax.pipeline import sources


def write(path, rng, *names):
  contents = {name: rng.bytes(9) for name in names}
  for name, content in contents.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
  return contents


def digest(*contents):
  return hashlib.sha256(b"".join(contents)).hexdigest()


def test_a_directory_is_known_by_its_weights(tmp_path, rng):
  made = write(tmp_path, rng, "b/x.safetensors", "a/y.safetensors", "a/c.json")
  source = sources.Directory(epath.Path(tmp_path), None, False)
  expected = digest(made["a/y.safetensors"], made["b/x.safetensors"])
  assert loading.checkpoint_hash(source, loading.Loading()) == expected


def test_a_transformer_is_known_with_its_other_components(tmp_path, rng):
  made = write(tmp_path, rng, "a.pth", "t/w.safetensors", "c/vae/v.safetensors")
  how = loading.Loading(components=str(tmp_path / "c"))
  for path, own in (("a.pth", "a.pth"), ("t", "t/w.safetensors")):
    source = sources.TransformerWeights(epath.Path(tmp_path / path), None)
    expected = digest(made[own], made["c/vae/v.safetensors"])
    assert loading.checkpoint_hash(source, how) == expected


@pytest.mark.parametrize(("step", "name"), [(None, "20"), (9, "9")])
def test_a_training_run_is_known_by_its_step(tmp_path, rng, step, name):
  files = [f"checkpoints/{n}/{f}" for n in ("9", "20") for f in ("a/b", "c")]
  made = write(tmp_path, rng, *files, "checkpoints/21.tmp/a")
  source = sources.TrainingRun(epath.Path(tmp_path))
  expected = digest(*(made[f"checkpoints/{name}/{f}"] for f in ("a/b", "c")))
  how = loading.Loading(step=step)
  assert loading.checkpoint_hash(source, how) == expected


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"controlnet_wiring": "original"}, "controlnet_wiring has no effect"),
    ({"fuse_lora": True}, "fuse_lora has no effect"),
    ({"lora_scale": (1.0,)}, "lora_scale has no effect"),
    ({"lora": ("a",), "lora_scale": (1.0, 2.0)}, "2 lora_scale for 1 lora"),
  ],
)
def test_what_has_no_effect_is_refused(values, message):
  with pytest.raises(ValueError, match=message):
    loading.Loading(**values)


def test_a_description_has_what_is_unusual():
  how = loading.Loading(vae_tile=64, lora=("a",))
  assert how.describe() == {"dtype": "float32", "vae_tile": 64, "lora": ("a",)}
