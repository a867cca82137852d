"""The guard knows which checkpoints need float16's limits, and says why."""

import logging

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sana_jax import config as config_lib
from sana_jax.models import sana
from sana_jax.weights import components, precision, zoo
from tests import tiny

FP16, BF16, F32 = (
  np.dtype(d) for d in (np.float16, jnp.bfloat16.dtype, np.float32)
)


@pytest.mark.parametrize("entry", zoo.ENTRIES, ids=lambda entry: entry.name)
def test_published_checkpoints_are_known_by_name(entry):
  # Fine-tuned or not, in whatever files: the table decides.
  decision = precision.trained_in_fp16(
    entry.make_config(),
    names=("transformer", f"/models/{entry.names[-1]}"),
    variants={"fp16", "bf16"},
    dtypes={F32},
  )
  assert decision.certain
  assert decision.clamp == (entry.precision == "fp16")
  assert entry.name in decision.reason


@pytest.mark.parametrize(
  ("config", "known", "clamp", "certain", "reason"),
  [
    (config_lib.sana_600m, {}, True, True, "fp16-trained.*0.6B without"),
    (config_lib.sana_600m, {"variants": {"bf16"}}, True, True, "0.6B without"),
    (config_lib.sana15_1600m, {"dtypes": {FP16}}, False, True, "key norms"),
    (config_lib.sana_sprint_600m, {}, False, True, "key norms"),
    (config_lib.sana_1600m_2k, {}, False, True, "positional embedding"),
    (config_lib.sana_1600m, {"variants": {None, "fp16"}}, True, True, "files"),
    (config_lib.sana_1600m, {"variants": {"bf16"}}, False, True, "files"),
    (config_lib.sana_1600m, {"dtypes": {BF16}}, False, True, "files"),
    (config_lib.sana_1600m, {"dtypes": {FP16, F32}}, True, True, "files"),
    (config_lib.sana_1600m, {"dtypes": {F32}}, True, False, "cannot tell"),
    (
      config_lib.sana_1600m,
      {"variants": {"fp16", "bf16"}},
      *(True, False, "fp16_clamp=True or fp16_clamp=False decides"),
    ),
    (
      lambda: tiny.transformer_config(qk_norm=None),
      {"dtypes": {FP16}},
      *(False, True, "no published model is 16 wide"),
    ),
  ],
)
def test_other_checkpoints_are_judged_by_what_they_have(
  config, known, clamp, certain, reason
):
  decision = precision.trained_in_fp16(config(), names=("mine",), **known)
  assert decision[:2] == (clamp, certain)
  assert "\n" not in decision.reason
  with pytest.raises(ValueError, match=reason):
    raise ValueError(decision.reason)


def test_the_user_has_the_last_word():
  decision = precision.trained_in_fp16(config_lib.sana_600m())
  assert precision.choose_clamp(decision, None)
  assert not precision.choose_clamp(decision, False)
  assert precision.choose_clamp(decision._replace(clamp=False), True)


@pytest.mark.parametrize(
  ("certain", "level"), [(True, logging.INFO), (False, logging.WARNING)]
)
def test_the_reason_is_logged_and_a_guess_is_a_warning(caplog, certain, level):
  with caplog.at_level(logging.INFO, logger="absl"):
    precision.choose_clamp(precision.Decision(True, certain, "because"), None)
  assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
    (level, "because")
  ]


def test_a_loaded_transformer_has_the_limit_it_needs(tmp_path):
  config = tiny.transformer_config(qk_norm=None)
  model = tiny.random_model(
    lambda: sana.SanaTransformer.from_config(config, rngs=nnx.Rngs(0)), 0
  )
  found = {}
  for name in ("mine", "Sana_600M_1024px_diffusers"):
    directory = tmp_path / name / "transformer"
    components.save_transformer(directory, model, config)
    found[name], _ = components.load_transformer(directory)
  assert not found["mine"].fp16_clamp
  assert found["Sana_600M_1024px_diffusers"].fp16_clamp
  forced, _ = components.load_transformer(directory, fp16_clamp=False)
  assert not forced.fp16_clamp
