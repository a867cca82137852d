"""Pipelines: same images however they are made, and errors that help."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sana_jax import pipeline as pipeline_lib
from sana_jax.diffusion import schedules
from sana_jax.pipeline import checks, execution, stages
from tests import tiny

PROMPTS = ["a red apple", "a green cat", "a table", "a cat on a red table"]
# float32 sums in another order, through a few steps and the decoder.
TOLERANCE = {"rtol": 2e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tiny.make_tokenizer(path)
  return path


@pytest.fixture(scope="module")
def flow(tokenizer):
  return tiny.make_pipeline(tokenizer)


@pytest.fixture(scope="module")
def sprint(tokenizer):
  return tiny.make_pipeline(tokenizer, solver=schedules.SCM())


@pytest.fixture(scope="module")
def saved(flow, tmp_path_factory):
  path = tmp_path_factory.mktemp("checkpoint")
  flow.save_pretrained(path)
  return path


@pytest.fixture
def broken(saved, tmp_path):
  """A copy of a checkpoint, to be broken."""
  return shutil.copytree(saved, tmp_path / "broken")


def load(path):
  return pipeline_lib.SanaPipeline.from_pretrained(
    path, devices=jax.devices()[:1]
  )


def test_a_prompt_becomes_an_image(flow):
  output = flow("a red apple")
  assert output.images.shape == (1, 32, 32, 3)
  assert output.latents.shape == (1, 8, 8, 4)
  assert output.images.min() >= 0
  assert output.images.max() <= 1
  assert output.images.std() > 0.01
  assert output.pil()[0].size == (32, 32)


@pytest.mark.parametrize("name", ["flow", "sprint"])
def test_an_image_depends_neither_on_its_batch_nor_on_devices(
  name, tokenizer, request
):
  pipe = request.getfixturevalue(name)
  single = [
    pipe(prompt, seed=3, image_index=i).images[0]
    for i, prompt in enumerate(PROMPTS)
  ]
  batch = pipe(PROMPTS, seed=3).images
  np.testing.assert_allclose(batch, np.stack(single), **TOLERANCE)
  spread = dataclasses.replace(pipe, devices=jax.devices())
  np.testing.assert_allclose(spread(PROMPTS, seed=3).images, batch, **TOLERANCE)


def test_seeds_and_indices_give_different_images(flow):
  first = flow("a red apple", seed=0, num_images_per_prompt=2).latents
  second = flow("a red apple", seed=1).latents
  assert np.abs(first[0] - first[1]).max() > 0.1
  assert np.abs(first[0] - second[0]).max() > 0.1


def test_several_images_of_several_prompts_come_prompt_by_prompt(flow):
  together = flow(PROMPTS[:2], num_images_per_prompt=2).images
  for i, prompt in enumerate(PROMPTS[:2]):
    alone = flow(prompt, num_images_per_prompt=2, image_index=2 * i)
    np.testing.assert_allclose(
      together[2 * i : 2 * i + 2], alone.images, **TOLERANCE
    )


def test_the_parts_together_are_the_whole(flow):
  settings = flow.generation_config.replace({"guidance_scale": 3.0})
  condition = flow.encode_prompt(PROMPTS[:2], settings)
  null = flow.encode_negative_prompt(["blurry"], condition, settings)
  keys = stages.image_keys([5, 5], np.arange(2))
  noise = stages.initial_latents(keys, (8, 8, 4))
  latents = flow.denoise(
    noise, flow.make_schedule(settings), condition, null, settings
  )
  whole = flow(
    PROMPTS[:2], negative_prompt="blurry", guidance_scale=3.0, seed=5
  )
  np.testing.assert_allclose(latents, whole.latents, **TOLERANCE)
  np.testing.assert_allclose(flow.decode(latents), whole.images, **TOLERANCE)


def test_a_trajectory_begins_with_noise_and_ends_with_the_latents(flow):
  condition = flow.encode_prompt(PROMPTS[:1])
  noise = stages.initial_latents(stages.image_keys([0], [0]), (8, 8, 4))
  args = (noise, flow.make_schedule(), condition)
  steps = flow.denoise(*args, trajectory=True)
  assert steps.samples.shape == (4, 1, 8, 8, 4)
  np.testing.assert_array_equal(steps.samples[0], noise)
  np.testing.assert_allclose(
    steps.samples[-1], flow.denoise(*args), **TOLERANCE
  )


def test_given_latents_replace_the_seed(flow):
  latents = stages.initial_latents(stages.image_keys([7], [0]), (8, 8, 4))
  np.testing.assert_allclose(
    flow("a cat", latents=latents).images,
    flow("a cat", seed=7).images,
    **TOLERANCE,
  )


def test_given_noise_replaces_the_seed(sprint):
  keys = stages.image_keys([7], [0])
  noise = stages.step_noise(keys, 2, (8, 8, 4))
  with_noise = sprint("a cat", seed=0, noise=noise).latents
  latents = stages.initial_latents(stages.image_keys([0], [0]), (8, 8, 4))
  np.testing.assert_allclose(
    with_noise,
    sprint("a cat", seed=7, latents=latents).latents,
    **TOLERANCE,
  )
  assert np.abs(with_noise - sprint("a cat", seed=0).latents).max() > 1e-3


def test_guidance_and_the_negative_prompt_matter(flow):
  plain = flow("a cat", guidance_scale=1.0).latents
  guided = flow("a cat").latents
  negative = flow("a cat", negative_prompt="a red apple").latents
  masked = flow("a cat", null_mask="caption").latents
  never = flow("a cat", guidance_interval=(0.0, 1e-6)).latents
  assert np.abs(plain - guided).max() > 1e-3
  assert np.abs(negative - guided).max() > 1e-3
  assert np.abs(masked - guided).max() > 1e-3
  np.testing.assert_allclose(never, plain, **TOLERANCE)


def test_each_prompt_may_have_its_negative_prompt(flow):
  both = flow(PROMPTS[:2], negative_prompt=["blurry", "low quality"]).latents
  second = flow(PROMPTS[1], negative_prompt="low quality", image_index=1)
  np.testing.assert_allclose(both[1:], second.latents, **TOLERANCE)


def test_sprint_feels_its_guidance_and_its_angles(sprint):
  usual = sprint("a cat").latents
  for changes in (
    {"guidance_scale": 2.0},
    {"intermediate_timesteps": 1.0},
    {"intermediate_timesteps": None},
    {"max_timesteps": 1.5},
  ):
    assert np.abs(usual - sprint("a cat", **changes).latents).max() > 1e-4
  custom = sprint("a cat", timesteps=[1.57080, 1.3, 0.0]).latents
  np.testing.assert_allclose(custom, usual, **TOLERANCE)
  one = sprint("a cat", num_inference_steps=1)
  assert one.images.shape == (1, 32, 32, 3)


def test_flow_euler_takes_custom_sigmas(tokenizer):
  pipe = tiny.make_pipeline(tokenizer, solver=schedules.FlowEuler(shift=1.0))
  even = pipe("a cat", sigmas=[1.0, 0.5]).latents
  condition = pipe.encode_prompt(["a cat"])
  schedule = pipe.solver.custom_schedule([1.0, 0.5])
  np.testing.assert_array_equal(schedule.sigmas, [1.0, 0.5, 0.0])
  null = pipe.encode_negative_prompt([""], condition)
  noise = stages.initial_latents(stages.image_keys([0], [0]), (8, 8, 4))
  np.testing.assert_allclose(
    even, pipe.denoise(noise, schedule, condition, null), **TOLERANCE
  )


def test_requested_sizes_are_generated(flow):
  output = flow("a cat", height=16, width=48)
  assert output.images.shape == (1, 16, 48, 3)
  assert output.latents.shape == (1, 4, 12, 4)


def test_binning_generates_a_trained_size_and_crops_to_the_request(tokenizer):
  pipe = tiny.make_pipeline(
    tokenizer,
    transformer=tiny.transformer_config(sample_size=16),
    autoencoder=tiny.autoencoder_config(stages=6),
  )
  pipe.generation_config.num_inference_steps = 1
  output = pipe("a cat", height=100, width=170)
  assert output.latents.shape == (1, 12, 20, 4)  # 384 x 640
  assert output.images.shape == (1, 100, 170, 3)
  square = pipe("a cat", use_resolution_binning=False, height=64, width=64)
  assert square.latents.shape == (1, 2, 2, 4)


def test_a_saved_pipeline_makes_the_same_images(flow, saved):
  again = load(saved)
  assert again.generation_config == flow.generation_config
  assert again.solver == flow.solver
  np.testing.assert_array_equal(
    again("a cat", seed=4).images, flow("a cat", seed=4).images
  )


def test_a_saved_sprint_pipeline_is_one_again(sprint, tmp_path):
  sprint.save_pretrained(tmp_path)
  again = load(tmp_path)
  assert again.is_sprint
  np.testing.assert_array_equal(again("a cat").latents, sprint("a cat").latents)


def test_settings_come_from_the_checkpoint_or_its_kind(broken):
  path = broken / "generation_config.json"
  path.write_text('{"num_inference_steps": 2, "complex_human_instruction": []}')
  settings = load(broken).generation_config
  assert settings.num_inference_steps == 2
  assert settings.complex_human_instruction == ()
  assert settings.guidance_scale == 4.5
  path.unlink()
  assert load(broken).generation_config == pipeline_lib.GenerationConfig()


@pytest.mark.slow
def test_bfloat16_gives_nearly_the_same_image(saved, flow):
  pipe = pipeline_lib.SanaPipeline.from_pretrained(
    saved, dtype=jnp.bfloat16, devices=jax.devices()[:1]
  )
  assert pipe.transformer.blocks.ffn.point.kernel.dtype == jnp.bfloat16
  found = pipe("a cat", num_inference_steps=1).images
  expected = flow("a cat", num_inference_steps=1).images
  # Eight bits of mantissa through random networks of a few layers.
  assert np.abs(found - expected).mean() < 0.05


def test_replacing_the_transformer_changes_the_images(flow):
  changed = dataclasses.replace(flow)
  changed.transformer = jax.tree.map(lambda w: 1.1 * w, flow.transformer)
  difference = changed("a cat").latents - flow("a cat").latents
  assert np.abs(difference).max() > 1e-3


@pytest.mark.usefixtures("nothing_compiled")
def test_progress_tells_compiling_from_running(tokenizer):
  events = []
  pipe = tiny.make_pipeline(tokenizer)
  pipe("a cat", progress=events.append)
  pipe("a cat", progress=events.append)
  done = [(e.stage, e.phase) for e in events if e.seconds is not None]
  # The instruction, the prompt, and the negative prompt, which has none.
  texts = [("text encoder", "compile"), ("text encoder", "run")] * 3
  rest = ["transformer", "decoder"]
  assert done == [
    *texts,
    *((stage, phase) for stage in rest for phase in ("compile", "run")),
    # The prompts of the first call are known.
    *((stage, "run") for stage in rest),
  ]


@pytest.mark.usefixtures("nothing_compiled")
def test_a_second_pipeline_of_the_same_shapes_compiles_nothing(tokenizer):
  first, second = (tiny.make_pipeline(tokenizer) for _ in range(2))
  second.transformer = jax.tree.map(lambda w: 1.1 * w, second.transformer)
  events = []
  expected = first("a cat").latents
  found = second("a cat", progress=events.append).latents
  assert {event.phase for event in events} == {"run"}
  # The program is the same, the weights are not.
  assert np.abs(found - expected).max() > 1e-3
  shallow = tiny.transformer_config(num_layers=1)
  tiny.make_pipeline(tokenizer, transformer=shallow)(
    "a cat", progress=events.append
  )
  assert {e.stage for e in events if e.phase == "compile"} == {"transformer"}
  events.clear()
  execution.forget_programs()
  second("a cat", seed=1, progress=events.append)
  compiled = {e.stage for e in events if e.phase == "compile"}
  assert compiled == {"transformer", "decoder"}


@pytest.mark.usefixtures("nothing_compiled")
def test_prompts_seeds_scales_and_shifts_do_not_compile_again(
  tokenizer, caplog
):
  pipe = tiny.make_pipeline(tokenizer)

  def compiled(*args, **kwargs) -> list[str]:
    caplog.clear()
    with jax.log_compiles():
      pipe(*args, **kwargs)
    messages = [record.getMessage() for record in caplog.records]
    return [message for message in messages if "Compiling" in message]

  assert compiled("a cat")
  assert not compiled("a red apple", seed=5, guidance_scale=2.25)
  pipe.solver = schedules.FlowDPMSolver(flow_shift=1.5)
  assert not compiled("a green cat", negative_prompt="blurry", seed=2)
  assert compiled("a cat", num_inference_steps=2)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"prompt": ""}, "prompt 0 is empty"),
    ({"prompt": []}, "empty list"),
    ({"prompt": ["a cat", "  "]}, "prompt 1 is empty"),
    (
      {"num_inference_steps": 0},
      "num_inference_steps must be at least 1",
    ),
    ({"max_sequence_length": 0}, "max_sequence_length must be at least 1"),
    ({"guidance_scale": float("nan")}, "guidance_scale must be a finite"),
    ({"null_mask": "none"}, "null_mask must be 'own' or 'caption'"),
    ({"height": 30}, "^height 30 must be .* 4, such as 28 or 32"),
    ({"width": 33}, "^width 33 must be .* 4, such as 32 or 36"),
    ({"width": 0}, "^width 0 must be .* 4, such as 4 or 8"),
    ({"use_resolution_binning": True}, "no resolution bins for sample_size 8"),
    ({"seed": -1}, "seed must be in"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least"),
    ({"image_index": -1}, "image_index must be in"),
    ({"latents": np.ones((1, 4, 8, 8))}, "expected \\(1, 8, 8, 4\\)"),
    ({"noise": np.ones((3, 1, 8, 8, 4))}, "this solver is deterministic"),
    ({"sigmas": [1.0, 0.5]}, "sigmas are for the FlowEuler solver"),
    ({"timesteps": [1.0, 0.0]}, "timesteps are for the SCM solver"),
    ({"max_timesteps": 1.5}, "max_timesteps cannot be used"),
    ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ({"guidance_interval": (0.5, 0.5)}, "0 <= low < high <= 1, got"),
    ({"guidance_interval": (0.0, 2.0)}, "0 <= low < high <= 1, got"),
    ({"guidance_interval": (0.5,)}, "must be two numbers"),
    ({"guidance_interval": ("a", "b")}, "must be two numbers"),
    ({"num_inference_steps": 2.5}, "must be a whole number, got 2.5"),
    ({"height": 64.0}, "height must be a whole number, got 64.0"),
  ],
)
def test_wrong_arguments_are_named(flow, arguments, message):
  with pytest.raises(ValueError, match=message):
    flow(**{"prompt": "a cat"} | arguments)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"negative_prompt": "blurry"}, "SANA-Sprint has no negative branch"),
    ({"guidance_interval": (0.1, 0.9)}, "guidance_interval cannot be used"),
    (
      {"num_inference_steps": 3, "intermediate_timesteps": 1.3},
      "is for 2 steps",
    ),
    (
      {"timesteps": [1.5, 0.0], "max_timesteps": 1.5},
      "max_timesteps cannot go with custom times",
    ),
    ({"noise": np.ones((3, 1, 8, 8, 4))}, "expected \\(2, 1, 8, 8, 4\\)"),
  ],
)
def test_wrong_arguments_of_sprint_are_named(sprint, arguments, message):
  with pytest.raises(ValueError, match=message):
    sprint("a cat", **arguments)


def test_prompts_must_be_strings():
  with pytest.raises(ValueError, match="prompt 1 is 3; expected a string"):
    checks.prompt_list(["a cat", 3])


def test_unknown_options_are_named(flow):
  with pytest.raises(TypeError, match=r"Unknown options \['steps'\]"):
    flow("a cat", steps=3)


def test_long_prompts_warn_of_what_they_lose(flow):
  with pytest.warns(UserWarning, match="dropped"):
    flow("a red apple and " * 20)


@pytest.mark.parametrize(
  ("part", "stage"),
  [
    ("text_encoder", "The text encoder's result is not finite"),
    ("transformer", r"result at step 1 of 3 \(sigma 1.000\) is not finite"),
    ("autoencoder", "The decoder's result is not finite"),
  ],
)
def test_broken_weights_are_traced_to_their_stage(flow, part, stage):
  pipe = dataclasses.replace(flow)
  nan = jax.tree.map(lambda w: w * np.float32(np.nan), getattr(pipe, part))
  setattr(pipe, part, nan)
  with pytest.raises(FloatingPointError, match=f"{stage}.*dtype=float32"):
    pipe("a cat")


def test_broken_latents_are_told_from_broken_steps(flow):
  latents = np.full((1, 8, 8, 4), np.inf, np.float32)
  with pytest.raises(FloatingPointError, match="initial latents are not"):
    flow("a cat", latents=latents)


def test_missing_checkpoints_and_indices_are_named(broken):
  with pytest.raises(FileNotFoundError, match="does not exist; expected a dir"):
    load(broken / "nowhere")
  (broken / "model_index.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
    load(broken)


def test_other_pipelines_are_refused(broken):
  (broken / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
  with pytest.raises(ValueError, match="describes a FluxPipeline"):
    load(broken)


def test_components_of_another_class_are_refused(broken):
  path = broken / "transformer" / "config.json"
  values = json.loads(path.read_text()) | {"_class_name": "Other"}
  path.write_text(json.dumps(values))
  with pytest.raises(ValueError, match="expected a SanaTransformer2DModel"):
    load(broken)


def test_truncated_weights_are_refused(broken):
  path = broken / "vae" / "diffusion_pytorch_model.safetensors"
  path.write_bytes(path.read_bytes()[:-100])
  with pytest.raises(ValueError, match=r"vae.*not a complete safetensors"):
    load(broken)


def test_weights_of_another_size_are_refused(broken):
  path = broken / "transformer" / "config.json"
  values = json.loads(path.read_text()) | {"num_layers": 3, "mlp_ratio": 2.0}
  path.write_text(json.dumps(values))
  with pytest.raises(ValueError, match="does not fit the model") as error:
    load(broken)
  assert "missing tensor transformer_blocks.2." in str(error.value)
  assert "ff.conv_point.weight has shape" in str(error.value)


def test_components_that_do_not_fit_each_other_are_refused(flow):
  with pytest.raises(ValueError, match="guidance_embeds is False, but"):
    dataclasses.replace(flow, solver=schedules.SCM())
  config = tiny.transformer_config(caption_channels=7, in_channels=5)
  with pytest.raises(ValueError, match="texts of width 7.*5 latent channels"):
    dataclasses.replace(flow, transformer_config=config)


def test_missing_variants_are_named(saved):
  with pytest.raises(FileNotFoundError, match="variant 'fp16'"):
    pipeline_lib.SanaPipeline.from_pretrained(saved, variant="fp16")


def test_float16_is_refused(saved):
  with pytest.raises(ValueError, match="overflow float16"):
    pipeline_lib.SanaPipeline.from_pretrained(saved, dtype=jnp.float16)


def test_wrong_generation_settings_name_their_file(broken):
  path = broken / "generation_config.json"
  path.write_text('{"steps": 3}')
  with pytest.raises(ValueError, match=r"generation_config\.json: .*steps"):
    load(broken)


def test_saving_needs_the_tokenizers_files(flow, tmp_path):
  pipe = dataclasses.replace(flow, tokenizer_directory=None)
  with pytest.raises(ValueError, match="no tokenizer_directory"):
    pipe.save_pretrained(tmp_path)
