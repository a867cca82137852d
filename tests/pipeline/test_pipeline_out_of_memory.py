"""A stage that does not fit, against its plan, says so and what would help."""

import re

import jax
import jax.numpy as jnp
import pytest
from absl import flags

import sample  # noqa: F401 (defines its flags)
from sana_jax.models import tiling, windows
from sana_jax.pipeline import (
  decoding,
  execution,
  memory,
  out_of_memory,
  sizes,
)
from tests import tiny

GIB = 2**30


def too_large(x):
  # Sorted, so that it must be stored: 2^50 bytes.
  return jnp.sort(jnp.arange(2**48, dtype=jnp.float32) * jnp.sum(x))[0]


def test_a_stage_names_itself_and_other_errors_stay_what_they_are():
  executor = execution.Executor(jax.devices()[:1])

  def run(function):
    shared, batched = {}, {"x": jnp.ones(2)}
    return executor.run(
      "transformer", function, shared=shared, batched=batched, static={}
    )

  with pytest.raises(
    execution.StageMemoryError,
    match="in the transformer. XLA: RESOURCE_EXHAUSTED",
  ):
    run(lambda x: x + too_large(x))

  def wrong(x):
    raise jax.errors.JaxRuntimeError("INTERNAL: wrong")

  with pytest.raises(jax.errors.JaxRuntimeError, match="^INTERNAL: wrong"):
    run(wrong)


def test_a_call_says_what_was_planned(tmp_path, monkeypatch):
  tiny.make_tokenizer(tmp_path)
  pipe = tiny.make_pipeline(tmp_path, devices=jax.devices()[:1])

  def hungry(*, autoencoder, latents, **static):
    return jnp.zeros((len(latents), 4, 4, 3)) + too_large(latents)

  monkeypatch.setattr(decoding, "decode_whole", hungry)
  size = {"height": 64, "width": 64}
  with pytest.raises(out_of_memory.OutOfMemoryError) as info:
    pipe("a", num_inference_steps=1, **size)
  need = info.value.plan.needs["decoder"]
  lines = str(info.value).splitlines()
  assert lines[0].startswith("Out of device memory in the decoder, against")
  assert "whole images" in lines[1]
  assert f"  {need.total / GIB:8.2f}  in all" in lines
  assert lines[-1].startswith("XLA: RESOURCE_EXHAUSTED")
  # The host's memory is the device's.
  assert "the text encoder on the host" not in str(info.value)
  # What is said of windows is taken.
  (side,) = re.findall(r"Windows\(window_side=(\d+)\)", str(info.value))
  pipe.tiling = windows.Windows(window_side=int(side))
  plan = pipe.plan_memory(settings=pipe.generation_config.replace(size))
  assert plan.decoding.windows == pipe.tiling


def error_of(
  stage="decoder",
  *,
  is_half=False,
  tiles=None,
  side=None,
  offload=False,
  pixels=(1024, 1024),
  on_cpu=False,
):
  plan = memory.Plan(
    decoding=decoding.Decoding(
      tiles, windows=side and windows.Windows(window_side=side)
    ),
    offload_text_encoder=offload,
    needs={stage: memory.Need(3 * GIB, GIB // 2)},
    available=4 * GIB,
    reason="1024x1024: as it was.",
    notable=False,
  )
  found = execution.StageMemoryError(stage, "RESOURCE_EXHAUSTED: x\npages")
  size = sizes.ImageSize(*pixels, *(side // 32 for side in pixels), 32)
  return out_of_memory.OutOfMemoryError(
    found, plan, size, is_half=is_half, on_cpu=on_cpu
  )


def test_the_prediction_is_a_table():
  lines = error_of().text().splitlines()
  assert lines[3:7] == [
    "      3.00  weights",
    "      0.50  to work with",
    "      3.50  in all",
    "      4.00  was available",
  ]
  assert "pages" not in lines[-1]


@pytest.mark.parametrize(
  ("changes", "offered", "not_offered"),
  [
    ({}, ["--vae_window=512", "--dtype", "--offload_text_encoder"], []),
    ({"side": 512}, ["--vae_window=256"], ["vae_tile"]),
    ({"stage": "encoder"}, ["--vae_tile=512"], ["vae_window"]),
    ({"tiles": tiling.square(512)}, ["--vae_tile=256"], []),
    # No smaller ones overlap by an eighth in whole latents.
    ({"tiles": tiling.square(256)}, ["--dtype"], ["vae_tile"]),
    ({"pixels": (512, 384)}, ["--vae_window=256"], []),
    ({"pixels": (512, 384), "stage": "encoder"}, ["--vae_tile=256"], []),
    ({"pixels": (512, 544)}, ["--vae_window=512"], []),
    ({"side": 96}, ["--vae_window=64"], []),
    ({"side": 32}, ["--dtype"], ["vae_window"]),
    ({"stage": "text encoder"}, ["--dtype"], ["--offload"]),
    ({"on_cpu": True}, ["--dtype"], ["--offload"]),
    ({"stage": "transformer"}, ["--batch_size", "--height"], ["vae_tile"]),
    ({"is_half": True, "offload": True}, [], ["--dtype", "--offload"]),
  ],
)
def test_what_is_turned_already_is_not_offered(changes, offered, not_offered):
  text = error_of(**changes).text(flags=True)
  assert all(option in text for option in offered)
  assert not any(option in text for option in not_offered)


def test_flags_and_options_that_are_named_exist():
  named = re.findall(r"--(\w+)", error_of().text(flags=True))
  assert len(named) == 6
  assert set(named) <= set(flags.FLAGS)
  text = str(error_of())
  assert "--" not in text
  options = set(re.findall(r": (\w+)=", text))
  assert options == {"tiling", "memory", "dtype"}
