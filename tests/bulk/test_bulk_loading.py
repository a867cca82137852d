"""Loading options that have no effect are refused."""

import pytest

from sana_jax import pipeline as pipeline_lib
from sana_jax.bulk import loading
from tests import tiny


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"controlnet_wiring": "original"}, "--controlnet_wiring has no effect"),
    ({"vae_tile": 64, "vae_window": 64}, "exclude each other; give one"),
    ({"fuse_lora": True}, "--fuse_lora has no effect"),
    ({"lora_scale": (1.0,)}, "--lora_scale has no effect"),
    (
      {"lora": ("a",), "lora_scale": (1.0, 2.0)},
      "2 --lora_scale for 1 --lora;",
    ),
  ],
)
def test_what_has_no_effect_is_refused(values, message):
  with pytest.raises(ValueError, match=message):
    loading.Loading(**values)


def test_a_description_has_what_is_unusual():
  how = loading.Loading(vae_tile=64, lora=("a",))
  assert how.describe() == {"dtype": "float32", "vae_tile": 64, "lora": ("a",)}


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"vae_window": 0}, "^--vae_window=0: .* must be positive, got 0"),
    ({"vae_window": 9}, "^--vae_window=9: .* a multiple of 4"),
    ({"vae_tile": 0}, "^--vae_tile=0: .* stride"),
    ({"vae_tile": 9}, "^--vae_tile=9: .* multiples of 4"),
  ],
)
def test_an_impossible_cut_is_refused_with_its_flag(
  tmp_path, monkeypatch, values, message
):
  tiny.make_tokenizer(tmp_path)
  pipe = tiny.make_pipeline(tmp_path)
  assert pipe.autoencoder_config.spatial_compression == 4
  monkeypatch.setattr(
    pipeline_lib.SanaPipeline, "from_pretrained", lambda *_, **__: pipe
  )
  with pytest.raises(ValueError, match=message):
    loading.load("anywhere", loading.Loading(**values))
