"""A run is known by the files that are read."""

import hashlib

import numpy as np
import pytest
from etils import epath

from sana_jax import config as config_lib
from sana_jax.bulk import loading, weight_files
from sana_jax.pipeline import sources
from sana_jax.weights import files, lora, orbax_files
from tests import tiny

NAME = "diffusion_pytorch_model.safetensors"
WHOLE = ("text_encoder", "transformer", "vae")


def write(path, rng, *names):
  contents = {name: rng.bytes(9) for name in names}
  for name, content in contents.items():
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_bytes(content)
  return contents


def write_orbax(path, rng):
  array = rng.normal(size=(3, 2)).astype(np.float32)
  orbax_files.write_component(path, {}, {"a/kernel": array})


def digest(*contents):
  return hashlib.sha256(b"".join(contents)).hexdigest()


def hash_of(source, **options):
  found = weight_files.hashes(source, loading.Loading(**options))
  return found["checkpoint_sha256"]


def directory(path):
  return sources.Directory(epath.Path(path), None, False)


def test_a_directory_is_known_by_its_weights(tmp_path, rng):
  names = [f"{part}/{NAME}" for part in ("controlnet", *WHOLE)]
  made = write(tmp_path, rng, *names, "other/x.safetensors", "vae/config.json")
  expected = digest(*(made[name] for name in names))
  assert hash_of(directory(tmp_path)) == expected


def test_only_the_variant_that_is_read_counts(tmp_path, rng):
  names = [f"{part}/{NAME}" for part in WHOLE]
  half = "vae/diffusion_pytorch_model.fp16.safetensors"
  made = write(tmp_path, rng, *names, half)
  own = [made[name] for name in names]
  assert hash_of(directory(tmp_path)) == digest(*own)
  expected = digest(*own[:2], made[half])
  assert hash_of(directory(tmp_path), variant="fp16") == expected


def test_orbax_parameters_count(tmp_path, rng):
  write(tmp_path, rng, *(f"{part}/{NAME}" for part in WHOLE[:2]))
  write_orbax(tmp_path / "vae", rng)
  before = hash_of(directory(tmp_path))
  write_orbax(tmp_path / "new", rng)
  (tmp_path / "vae").rename(tmp_path / "old")
  (tmp_path / "new").rename(tmp_path / "vae")
  assert hash_of(directory(tmp_path)) != before


def test_a_transformer_is_known_with_its_other_components(tmp_path, rng):
  others = [f"c/{part}/{NAME}" for part in WHOLE]
  made = write(tmp_path, rng, "a.pth", f"t/{NAME}", *others)
  rest = [made[others[0]], made[others[2]]]
  for path, own in (("a.pth", "a.pth"), ("t", f"t/{NAME}")):
    source = sources.TransformerWeights(epath.Path(tmp_path / path), None)
    expected = digest(made[own], *rest)
    assert hash_of(source, components=str(tmp_path / "c")) == expected


@pytest.mark.parametrize(
  ("step", "name", "trained"), [(None, "20", False), (9, "9", True)]
)
def test_a_training_run_is_known_by_its_step_and_frozen_models(
  tmp_path, rng, step, name, trained
):
  saved = [f"checkpoints/{n}/{f}" for n in ("9", "20") for f in ("a/b", "c")]
  models = [f"{place}/{NAME}" for place in ("v", "t", "c/vae")]
  made = write(tmp_path, rng, *saved, "checkpoints/21.tmp/a", *models)
  tiny.make_tokenizer(tmp_path / "c" / "tokenizer")
  write(tmp_path, rng, f"c/text_encoder/{NAME}")
  config = config_lib.TextToImageConfig(
    autoencoder=str(tmp_path / "v"),
    text_encoder_path=str(tmp_path / "t"),
    train_text_encoder=trained,
  )
  files.write_json(tmp_path / "config.json", config.to_dict())
  source = sources.TrainingRun(epath.Path(tmp_path))
  own = [made[f"checkpoints/{name}/{f}"] for f in ("a/b", "c")]
  used = models[:1] if trained else models[:2]
  expected = digest(*own, *(made[model] for model in used))
  assert hash_of(source, step=step) == expected
  changed = hash_of(source, step=step, components=str(tmp_path / "c"))
  assert changed != expected


def test_adapters_and_controlnets_are_known_by_hashes_of_their_own(
  tmp_path, rng
):
  made = write(tmp_path, rng, f"c/{NAME}", "d.pth", "a.pth")
  adapter = lora.Lora(
    {"x": lora.Pair(rng.normal(size=(2, 4)), rng.normal(size=(4, 2)), 2.0)}
  )
  lora.save(tmp_path / "l", adapter)
  peft = write(
    tmp_path, rng, "p/adapter_model.safetensors", "p/adapter_config.json"
  )
  source = sources.TransformerWeights(epath.Path(tmp_path / "a.pth"), None)
  how = loading.Loading(
    controlnet=str(tmp_path / "c"),
    lora=(str(tmp_path / "l"), str(tmp_path / "p")),
  )
  stored = (tmp_path / "l" / "pytorch_lora_weights.safetensors").read_bytes()
  assert weight_files.hashes(source, how) == {
    "checkpoint_sha256": digest(made["a.pth"]),
    "controlnet_sha256": digest(made[f"c/{NAME}"]),
    "lora_sha256": [digest(stored), digest(*peft.values())],
  }
  how = loading.Loading(controlnet=str(tmp_path / "d.pth"))
  found = weight_files.hashes(source, how)
  assert found["controlnet_sha256"] == digest(made["d.pth"])


def test_no_weights_are_no_hash(tmp_path):
  for part in WHOLE:
    (tmp_path / part).mkdir()
  with pytest.raises(FileNotFoundError, match="no safetensors weights"):
    hash_of(directory(tmp_path))
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  with pytest.raises(FileNotFoundError, match="1 is empty; expected saved"):
    hash_of(sources.TrainingRun(epath.Path(tmp_path)))
