"""Loading options that have no effect are refused."""

import pytest

from sana_jax.bulk import loading


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"controlnet_wiring": "original"}, "controlnet_wiring has no effect"),
    ({"vae_tile": 64, "vae_window": 64}, "exclude each other; give one"),
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
