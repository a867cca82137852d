"""Image-to-image, inpainting, perturbed attention, best of n."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from sana_jax import pipeline as pipeline_lib
from sana_jax import resolution
from sana_jax.diffusion import schedules
from sana_jax.pipeline import denoising, options, sizes, stages
from sana_jax.weights import lora
from tests import tiny

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


@pytest.fixture
def picture(rng):
  return rng.uniform(size=(32, 32, 3)).astype(np.float32)


def test_identity_attention_makes_values_pass_in_the_chosen_blocks(flow, rng):
  model = flow.transformer  # has query and key norms, which values bypass
  latents = jnp.asarray(rng.normal(size=(2, 4, 4, 4)), jnp.float32)
  text = jnp.asarray(rng.normal(size=(2, 5, 12)), jnp.float32)
  time = jnp.array([500.0, 20.0])
  identity = jnp.array([[False, False], [False, True]])
  both = model(latents, time, text, identity_attention=identity)
  plain = model(latents, time, text)
  np.testing.assert_allclose(both[0], plain[0], rtol=1e-5, atol=1e-5)
  assert np.abs(both[1] - plain[1]).max() > 1e-3

  # The second block written out: attention is the identity on its values.
  block = jax.tree.map(lambda leaf: leaf[1], model.blocks)
  x = jnp.asarray(rng.normal(size=(2, 4, 4, 16)), jnp.float32)
  attention = block.self_attention
  values = attention.qkv(x)[..., 32:]
  np.testing.assert_allclose(
    block.attend_image(x, jnp.array([True, True])),
    attention.out(values),
    rtol=1e-5,
    atol=1e-5,
  )


def test_perturbed_attention_guidance_is_off_at_zero_and_works_alone(flow):
  plain = flow("a cat").latents
  perturbed = flow("a cat", pag_scale=2.0).latents
  other = flow("a cat", pag_scale=2.0, pag_applied_layers=(0,)).latents
  fading = flow("a cat", pag_scale=2.0, pag_adaptive_scale=0.005).latents
  alone = flow("a cat", pag_scale=2.0, guidance_scale=1.0).latents
  unguided = flow("a cat", guidance_scale=1.0).latents
  never = flow("a cat", pag_scale=2.0, guidance_interval=(0.0, 1e-6)).latents
  for first, second in (
    *((plain, perturbed), (perturbed, other), (perturbed, fading)),
    (alone, unguided),
  ):
    assert np.abs(first - second).max() > 1e-4
  np.testing.assert_allclose(flow("a cat", pag_scale=0.0).latents, plain)
  np.testing.assert_allclose(never, unguided, **TOLERANCE)


@pytest.mark.parametrize(
  ("depth", "layers"), [(20, (8,)), (28, (14,)), (60, (8,)), (3, (1,))]
)
def test_the_perturbed_block_is_the_published_one(depth, layers):
  settings = pipeline_lib.GenerationConfig(pag_scale=1.0)
  assert options.pag_layers(settings, depth) == layers


@pytest.mark.parametrize("name", ["flow", "sprint"])
def test_full_strength_forgets_the_image_and_little_keeps_it(
  name, request, picture
):
  pipe = request.getfixturevalue(name)
  steps = {"num_inference_steps": 3, "guidance_scale": 4.0}
  from_noise = pipe("a cat", **steps).latents
  clean = np.asarray(pipe.encode_image(picture[None]))
  distances = [
    np.abs(pipe("a cat", image=picture, strength=s, **steps).latents - clean)
    for s in (0.34, 1.0)
  ]
  forgotten = pipe("a cat", image=picture, strength=1.0, **steps).latents
  # At sigma 0.9997 (flow) and at angle 1.5708 (Sprint) little is left.
  assert np.abs(forgotten - from_noise).max() < 0.05 * np.abs(from_noise).max()
  assert distances[0].mean() < distances[1].mean()


def test_image_to_image_starts_at_the_noise_level_of_its_step(flow, picture):
  schedule = flow.make_schedule(strength=0.5)
  assert schedule.num_steps == 2  # of 3, rounded as the reference does
  clean = flow.encode_image(picture[None])
  noise = stages.initial_latents(stages.image_keys([4], [0]), (8, 8, 4))
  start = denoising.add_noise(clean, noise, schedule, on_circle=False)
  sigma = schedule.sigmas[0]
  np.testing.assert_allclose(
    start, (1 - sigma) * clean + sigma * noise, rtol=1e-6, atol=1e-6
  )
  condition = flow.encode_prompt(["a cat"])
  null = flow.encode_negative_prompt([""], condition)
  by_hand = flow.denoise(start, schedule, condition, null)
  called = flow("a cat", image=picture, strength=0.5, seed=4).latents
  np.testing.assert_allclose(called, by_hand, **TOLERANCE)


@pytest.mark.parametrize("name", ["flow", "sprint"])
def test_inpainting_keeps_what_the_mask_keeps(name, request, picture):
  pipe = request.getfixturevalue(name)
  mask = np.zeros((32, 32), np.float32)
  mask[:, 16:] = 1
  output = pipe("a cat", image=picture, mask_image=mask, guidance_scale=4.0)
  clean = np.asarray(pipe.encode_image(picture[None]))
  np.testing.assert_allclose(
    output.latents[:, :, :4], clean[:, :, :4], rtol=1e-5, atol=1e-5
  )
  assert np.abs(output.latents[:, :, 4:] - clean[:, :, 4:]).max() > 0.1
  np.testing.assert_array_equal(output.images[0, :, :16], picture[:, :16])
  assert np.abs(output.images[0, :, 16:] - picture[:, 16:]).max() > 0.1
  decoded = pipe(
    *("a cat",),
    image=picture,
    mask_image=mask,
    composite_pixels=False,
    guidance_scale=4.0,
  )
  np.testing.assert_array_equal(decoded.latents, output.latents)
  assert np.abs(decoded.images[0, :, :16] - picture[:, :16]).max() > 1e-3


def test_the_known_part_follows_the_noise_level_of_every_step(flow, rng):
  schedule = flow.make_schedule()
  clean, noise, other = (
    jnp.asarray(rng.normal(size=(1, 8, 8, 4)), jnp.float32) for _ in range(3)
  )
  mask = jnp.asarray(rng.uniform(size=(1, 8, 8, 1)) > 0.5, jnp.float32)
  steps = flow.denoise(
    other,
    schedule,
    flow.encode_prompt(["a cat"]),
    known=denoising.Known(clean, noise, mask),
    trajectory=True,
  )
  for i, sigma in enumerate(schedule.sigmas[1:]):
    np.testing.assert_allclose(
      (1 - mask) * steps.samples[i + 1],
      (1 - mask) * ((1 - sigma) * clean + sigma * noise),
      rtol=1e-5,
      atol=1e-5,
    )


@pytest.fixture(scope="module")
def steered(tokenizer):
  return tiny.make_pipeline(tokenizer, controlnet=True)


def test_a_control_image_steers(steered, picture):
  control = steered("a cat", control_image=picture).latents
  other = steered("a cat", control_image=1 - picture).latents
  weak = steered(
    *("a cat",), control_image=picture, controlnet_conditioning_scale=0.0
  ).latents
  plain = dataclasses.replace(steered, controlnet=None, controlnet_config=None)
  assert np.abs(control - other).max() > 1e-3
  np.testing.assert_allclose(weak, plain("a cat").latents, **TOLERANCE)
  original = dataclasses.replace(steered, controlnet_wiring="original")
  rewired = original("a cat", control_image=picture).latents
  assert np.abs(rewired - control).max() > 1e-3


def test_a_control_image_goes_with_everything_else(steered, picture):
  both = steered(
    ["a cat", "a table"],
    negative_prompt="blurry",
    control_image=picture,
    image=picture,
    mask_image=np.tri(32, dtype=np.float32),
    pag_scale=1.0,
    seed=[1, 2],
  ).latents
  alone = steered(
    "a table",
    negative_prompt="blurry",
    control_image=picture,
    image=picture,
    mask_image=np.tri(32, dtype=np.float32),
    pag_scale=1.0,
    seed=2,
    image_index=1,
  ).latents
  np.testing.assert_allclose(both[1:], alone, **TOLERANCE)


def test_controlnets_and_control_images_come_together(flow, steered, picture):
  with pytest.raises(ValueError, match="control_image is missing"):
    steered("a cat")
  with pytest.raises(ValueError, match="the pipeline has no ControlNet"):
    flow("a cat", control_image=picture)
  with pytest.raises(ValueError, match="the pipeline has no ControlNet"):
    flow.denoise(
      *(np.ones((1, 8, 8, 4)), flow.make_schedule()),
      flow.encode_prompt(["a cat"]),
      control=np.ones((1, 8, 8, 4)),
    )
  with pytest.raises(ValueError, match="wiring must be one of"):
    dataclasses.replace(steered, controlnet_wiring="other")
  wide = dataclasses.replace(steered.controlnet_config, attention_head_dim=16)
  with pytest.raises(ValueError, match="ControlNet has width 32, the transf"):
    dataclasses.replace(steered, controlnet_config=wide)


def test_a_saved_controlnet_comes_back(steered, picture, tmp_path):
  steered.save_pretrained(tmp_path)
  again = pipeline_lib.SanaPipeline.from_pretrained(
    tmp_path, devices=jax.devices()[:1]
  )
  np.testing.assert_array_equal(
    again("a cat", control_image=picture).images,
    steered("a cat", control_image=picture).images,
  )
  original = dataclasses.replace(steered, controlnet_wiring="original")
  with pytest.raises(ValueError, match="wired 'original', which this layout"):
    original.save_pretrained(tmp_path / "other")


def test_sprint_has_no_controlnet(sprint, steered):
  with pytest.raises(ValueError, match="cannot steer SANA-Sprint"):
    dataclasses.replace(
      sprint,
      controlnet=steered.controlnet,
      controlnet_config=steered.controlnet_config,
    )


def test_pictures_from_files_are_turned_scaled_and_cropped(flow, picture):
  large = np.kron(picture, np.ones((2, 2, 1), np.float32))
  wide = np.concatenate([np.zeros((64, 20, 3)), large], axis=1)
  wide = np.concatenate([wide, np.zeros((64, 20, 3))], axis=1)
  image = PIL.Image.fromarray((wide * 255).round().astype(np.uint8))
  turned = image.transpose(PIL.Image.Transpose.ROTATE_90)
  exif = turned.getexif()
  exif[0x0112] = 6  # to be turned clockwise to be seen upright
  settings = {"height": 32, "width": 32, "strength": 0.3}
  upright = flow("a cat", image=image, **settings).latents
  same = flow("a cat", image=turned, **settings).latents
  np.testing.assert_allclose(upright, same, **TOLERANCE)
  # Lanczos halves what was doubled, nearly; eight bits round.
  straight = flow("a cat", image=picture, **settings).latents
  assert np.abs(upright - straight).mean() < 0.5 * np.abs(straight).mean()
  assert flow("a cat", image=image, strength=0.3).images.shape == (
    *(1, 24, 40, 3),
  )


def test_transparent_pictures_stand_on_white(flow):
  clear = PIL.Image.new("RGBA", (32, 32), (0, 0, 0, 0))
  white = PIL.Image.new("RGB", (32, 32), "white")
  np.testing.assert_array_equal(
    flow("a cat", image=clear).latents, flow("a cat", image=white).latents
  )


@pytest.mark.parametrize(
  ("aspect", "expected"),
  [("1:1", (32, 32)), ("2:1", (24, 44)), ("9:16", (44, 24))],
)
def test_an_aspect_keeps_the_area_where_there_are_no_bins(
  flow, aspect, expected
):
  settings = flow.generation_config.replace({"aspect": aspect})
  assert flow.image_size(settings)[:2] == expected


def test_an_aspect_is_the_closest_bin_where_there_are_bins():
  settings = pipeline_lib.GenerationConfig(aspect="16:9")
  config = tiny.transformer_config(sample_size=32)
  autoencoder = tiny.autoencoder_config(stages=6)
  size = sizes.resolve(settings, config, autoencoder)
  assert size == (768, 1344, 24, 42, 32)
  assert size[:2] in resolution.bins(32).values()
  assert size.generated == (768, 1344)


def test_a_calls_size_replaces_a_checkpoints_aspect():
  settings = pipeline_lib.GenerationConfig(aspect="16:9")
  assert settings.replace({"height": 64}).aspect is None
  settings = pipeline_lib.GenerationConfig(height=64, width=32)
  changed = settings.replace({"aspect": "2:1"})
  assert (changed.height, changed.width, changed.aspect) == (None, None, "2:1")


def test_every_image_may_have_its_seed_and_number(flow):
  both = flow(["a cat", "a table"], seed=[3, 9], image_index=[7, 2]).images
  first = flow("a cat", seed=3, image_index=7).images
  second = flow("a table", seed=9, image_index=2).images
  np.testing.assert_allclose(both, np.concatenate([first, second]), **TOLERANCE)


def test_every_distinct_prompt_is_encoded_once(tokenizer):
  pipe = tiny.make_pipeline(tokenizer)
  runs = []

  def progress(event):
    if event[:2] == ("text encoder", "run") and event.seconds is not None:
      runs.append(event)

  pipe(["a cat", "a dog", "a cat"], progress=progress)
  # The instruction, the prompts, and the empty negative prompt.
  assert len(runs) == 3
  again = pipe(["a dog", "a cat"], progress=progress, seed=2)
  assert len(runs) == 3
  pipe("a cat", max_sequence_length=8, progress=progress)
  assert len(runs) == 5
  fresh = dataclasses.replace(pipe)
  np.testing.assert_array_equal(
    fresh(["a dog", "a cat"], seed=2).images, again.images
  )


def test_a_new_text_encoder_encodes_anew(tokenizer):
  pipe = tiny.make_pipeline(tokenizer)
  before = pipe("a cat").latents
  pipe.text_encoder = jax.tree.map(lambda w: 1.2 * w, pipe.text_encoder)
  assert np.abs(pipe("a cat").latents - before).max() > 1e-3


def test_the_best_of_n_is_the_scorers_favourite(flow):
  seen = []

  def scorer(images, prompts):
    seen.append(list(prompts))
    return images.mean(axis=(1, 2, 3))

  best = pipeline_lib.best_of(
    flow, ["a cat", "a table"], n=3, scorer=scorer, seed=5
  )
  assert seen == [["a cat"] * 3, ["a table"] * 3]
  assert best.scores.shape == (2, 3)
  for i, prompt in enumerate(["a cat", "a table"]):
    all_three = flow(
      prompt, num_images_per_prompt=3, seed=5, image_index=3 * i
    ).images
    winner = int(np.argmax(all_three.mean(axis=(1, 2, 3))))
    assert best.image_index[i] == 3 * i + winner
    np.testing.assert_array_equal(best.output.images[i], all_three[winner])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"n": 0}, "n must be at least 1"),
    ({"scorer": lambda images, _: images[:, 0, 0]}, "one finite number"),
    ({"scorer": lambda images, _: [np.nan] * len(images)}, "one finite number"),
  ],
)
def test_wrong_scores_are_named(flow, changes, message):
  arguments = {"n": 2, "scorer": lambda images, _: np.ones(len(images))}
  with pytest.raises(ValueError, match=message):
    pipeline_lib.best_of(flow, ["a cat"], **arguments | changes)


def test_best_of_takes_one_prompt_and_a_negative_prompt_for_each(flow):
  with pytest.raises(TypeError, match="num_images_per_prompt cannot go"):
    pipeline_lib.best_of(
      flow, "a", n=1, scorer=lambda i, _: [0.0], num_images_per_prompt=2
    )
  scorer = lambda images, _: images.mean(axis=(1, 2, 3))  # noqa: E731
  one = pipeline_lib.best_of(flow, "a cat", n=2, scorer=scorer)
  assert one.output.images.shape == (1, 32, 32, 3)
  two = pipeline_lib.best_of(
    flow,
    ["a cat", "a table"],
    n=2,
    scorer=scorer,
    negative_prompt=["", "blurry"],
  )
  np.testing.assert_array_equal(two.scores[0], one.scores[0])
  other = pipeline_lib.best_of(flow, ["a cat", "a table"], n=2, scorer=scorer)
  assert np.abs(two.scores[1] - other.scores[1]).max() > 1e-5


@pytest.mark.parametrize("name", ["flow", "sprint"])
def test_an_image_matters_at_the_default_strength(name, request, picture):
  pipe = request.getfixturevalue(name)
  steps = {} if name == "sprint" else {"num_inference_steps": 5}
  plain = pipe("a cat", **steps).latents
  started = pipe("a cat", image=picture, **steps).latents
  assert np.abs(plain - started).max() > 1e-2


def test_a_strength_that_forgets_the_image_warns(sprint, picture):
  with pytest.warns(UserWarning, match="strength 0.6 makes everything anew"):
    sprint("a cat", image=picture, strength=0.6)


def test_one_picture_is_encoded_once_for_all_images(flow, picture):
  shapes = []
  events = []
  fresh = dataclasses.replace(flow)
  run = fresh._executor.run

  def watched(stage, function, **arguments):
    if stage == "encoder":
      shapes.append(arguments["batched"]["images"].shape[0])
    return run(stage, function, **arguments)

  fresh._executor.run = watched
  both = fresh(["a cat", "a table"], image=picture, progress=events.append)
  assert shapes == [1]
  several = fresh(["a cat", "a table"], image=np.stack([picture] * 2))
  assert shapes == [1, 2]
  np.testing.assert_allclose(both.images, several.images, **TOLERANCE)


def test_sixteen_bits_are_rounded_to_eight(flow, rng):
  levels = rng.integers(0, 256, size=(32, 32), dtype=np.uint16)
  deep = PIL.Image.fromarray(levels * 257)
  assert deep.mode == "I;16"
  shallow = PIL.Image.fromarray(levels.astype(np.uint8))
  np.testing.assert_array_equal(
    flow("a cat", image=deep).latents, flow("a cat", image=shallow).latents
  )


def test_an_interval_up_to_one_is_always(tokenizer):
  pipe = tiny.make_pipeline(tokenizer, solver=schedules.FlowEuler())
  always = pipe("a cat", guidance_interval=(0.0, 1.0)).latents
  np.testing.assert_allclose(always, pipe("a cat").latents, **TOLERANCE)


def test_attached_adapters_are_not_saved_by_halves(flow, rng, tmp_path):
  down = rng.normal(size=(2, 16)).astype(np.float32)
  up = rng.normal(size=(16, 2)).astype(np.float32)
  adapter = lora.Lora(
    {"transformer_blocks.0.attn1.to_q": lora.Pair(down, up, 2.0)}, "test"
  )
  pipe = dataclasses.replace(flow)
  pipe.transformer = lora.attach(pipe.transformer, [(adapter, 1.0)])
  with pytest.raises(ValueError, match=r"use lora\.fuse"):
    pipe.save_pretrained(tmp_path / "new")
  assert not (tmp_path / "new").exists()


IMAGE = np.full((32, 32, 3), 0.5, np.float32)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"mask_image": IMAGE[..., 0]}, "mask_image has no effect: there is no"),
    (
      {"controlnet_conditioning_scale": 0.5},
      "controlnet_conditioning_scale has no effect",
    ),
    ({"strength": 0.5}, "strength has no effect: there is no image"),
    ({"image": IMAGE, "strength": 0.0}, r"strength must be in \(0, 1\], got"),
    ({"image": IMAGE, "strength": 1.5}, r"strength must be in \(0, 1\], got"),
    (
      {"image": IMAGE, "mask_image": np.ones((16, 32), np.float32)},
      "mask_image is 32x16 pixels, image is 32x32 pixels",
    ),
    (
      {"image": IMAGE, "mask_image": np.zeros((32, 32), np.float32)},
      "mask_image 0 has nothing to make anew",
    ),
    ({"image": IMAGE[:, :, 0]}, r"image is an array of shape \(32, 32\)"),
    ({"image": IMAGE[:16], "height": 32}, "Pass a PIL image to have it"),
    ({"image": 255 * IMAGE}, r"must have float values in \[0, 1\]"),
    ({"image": np.stack([IMAGE] * 3)}, "holds 3 pictures for 1 images"),
    ({"image": IMAGE, "composite_pixels": True}, "there is no mask_image"),
    (
      {"pag_adaptive_scale": 0.1},
      "pag_adaptive_scale has no effect: pag_scale",
    ),
    ({"pag_applied_layers": (0,)}, "pag_applied_layers has no effect"),
    ({"pag_scale": 1.0, "pag_applied_layers": (2,)}, "blocks 0 to 1"),
    ({"pag_scale": -1.0}, "pag_scale must not be negative"),
    (
      {"guidance_scale": 1.0, "guidance_interval": (0.1, 0.9)},
      "guidance_interval has no effect: guidance is off",
    ),
    (
      {"guidance_scale": 1.0, "negative_prompt": "blurry"},
      "negative_prompt has no effect",
    ),
    ({"aspect": "16x9"}, "width to height, such as '16:9', got '16x9'"),
    ({"aspect": "0:9"}, "width to height"),
    ({"aspect": "1:1", "height": 32}, "cannot go with height or width"),
    ({"seed": [1, 2]}, r"seed has shape \(2,\) for 1 images"),
    ({"seed": [1.5]}, "seed must be whole numbers"),
    ({"image_index": 2**32}, "image_index must be in"),
  ],
)
def test_wrong_and_useless_arguments_are_named(flow, arguments, message):
  with pytest.raises(ValueError, match=message):
    flow(**{"prompt": "a cat"} | arguments)


@pytest.mark.parametrize(
  ("name", "arguments", "message"),
  [
    ("sprint", {"num_inference_steps": 6}, "SANA-Sprint is made for 1 to 4"),
    ("sprint", {"guidance_scale": 1.0}, "trained with 4, 4.5 and 5"),
    ("flow", {"guidance_scale": 15.0}, "more than 10 burns colours"),
    ("flow", {"height": 64, "width": 64}, r"64x64 pixels \(this checkpoint"),
  ],
)
def test_settings_a_checkpoint_was_not_made_for_warn(
  name, arguments, message, request
):
  with pytest.warns(UserWarning, match=message):
    request.getfixturevalue(name)("a cat", **arguments)


def test_sprint_refuses_what_needs_a_second_branch(sprint):
  with pytest.raises(ValueError, match="pag_scale cannot be used"):
    sprint("a cat", pag_scale=2.0)


def test_in_batches_of_one_size_a_prompt_does_not_feel_the_others(tokenizer):
  pipe = tiny.make_pipeline(tokenizer)
  pipe.prompt_batch_size = 4
  prompts = ["a cat", "a red apple", "a table", "a green cat on a table", "a"]
  together = pipe.encode_prompt(prompts)
  fresh = dataclasses.replace(pipe)
  for i in (3, 0, 4):
    alone = fresh.encode_prompt([prompts[i]])
    np.testing.assert_array_equal(alone.states[0], together.states[i])
